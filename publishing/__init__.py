"""Publishing on the Hub: model cards, uploads in one commit, loading back; `upload_to_hub` gathers the files."""
