"""Credentials are found wherever they hide, named without being shown, and stop an upload before it begins."""

import json
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi
from publishing_fakes import write

from internvl_hub.publishing.secrets_check import SecretError, refuse_secrets
from internvl_hub.upload_to_hub import VOCABULARIES, gather, push

ROOT = Path(__file__).resolve().parents[2]
# Put together here, so that no scanner takes this file for a leak.
TAIL = "aB3dE5fG7hJ9kL1mN2pQ4rS6tU8vW0xYz" + "Q7w"
SECRETS = {
    "hub": ("hf_" + TAIL, "Hugging Face token"),
    "aws": ("AKIA" + "Q3E7R9T1Y5U2I8O4", "AWS access key"),
    "key": ("-----BEGIN RSA " + "PRIVATE KEY-----", "private key"),
    "github": ("ghp_" + TAIL, "GitHub token"),
    "openai": ("sk-proj-" + TAIL, "API key"),
    "slack": ("xoxb-" + "123456789-abcdefghi", "Slack token"),
    "address": ("https://me:" + "pa55w0rd@example.org/x", "password in an address"),
    "gitlab": ("glpat-" + TAIL[:20], "GitLab token"),
    "shell": ("export WANDB_" + "API_KEY=" + "0123456789abcdef" * 2 + "01234567", "credential"),
    "yaml": ("api_" + "key: " + "0123456789abcdef" * 2, "credential"),
    "ini": ("aws_secret_" + "access_key = " + "wJalrXUtnFEMI/K7MDENG/" + TAIL[:18], "credential"),
    "password": ("pass" + "word: " + "hunter2-Xy9-qqqqq", "credential"),
    "setting": ('"api_key": ' + '"' + TAIL + '"', "credential"),
}


@pytest.mark.parametrize("name", SECRETS)
def test_found_and_not_shown(tmp_path: Path, name: str) -> None:
    secret, kind = SECRETS[name]
    file = write(tmp_path, {"README.md": f"one\ntwo {secret}\n"}) / "README.md"
    with pytest.raises(SecretError, match=f"README.md, line 2, holds an? {kind}") as caught:
        refuse_secrets([file])
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "https://huggingface.co/user/name@v1",
        "risk-" + "a" * 40,
        "hf_hub_x",
        "num_tokens: 123456789012",
        '"Ġpassword": 3588, "password=": 123456789012',
        "password: str = ...",
        "api_key=None",
        "api_key = os.environ_2['A_LONG_NAME_1']",
        "api_key=read_the_key_2_of_it(3)",
        "access_token=token_of_the_user_3",
        "password: the_password_that_you_chose",
        "api_key: xxxxxxxxxxxxxxxxxxxxxxxx1",
    ],
    ids=range(13),
)
def test_placeholders_and_plain_text_pass(tmp_path: Path, text: str) -> None:
    refuse_secrets([write(tmp_path, {"README.md": text}) / "README.md"])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_found_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "README.md").write_text(f"one\ntwo {SECRETS['hub'][0]}\n", encoding=encoding)
    with pytest.raises(SecretError, match="README.md, line 2, holds a Hugging Face token"):
        refuse_secrets([tmp_path / "README.md"])


def test_vocabularies_pass(tmp_path: Path) -> None:
    files = [path for path in (ROOT / "tests" / "fixtures").rglob("*") if path.name in VOCABULARIES]
    assert len(files) > 3
    refuse_secrets(files)


def test_recipe_is_named_where_the_card_is_made_of_it(checkpoint: Path, code_root: Path) -> None:
    write(checkpoint, {"recipe.yaml": f"training:\n  hub_token: {SECRETS['hub'][0]}\n"})
    with pytest.raises(SecretError, match="recipe.yaml, line 2, holds a Hugging Face token"):
        push(checkpoint, "user/name", code_root=code_root, dry_run=True)
    write(checkpoint, {"README.md": "mine"})
    push(checkpoint, "user/name", code_root=code_root, dry_run=True)


def test_header_of_weights_is_read_and_not_the_weights(tmp_path: Path) -> None:
    secret = SECRETS["hub"][0]
    for place, found in (("header", True), ("tensor", False)):
        header = json.dumps({"__metadata__": {"note": f"{secret} " if place == "header" else ""}}).encode()
        content = len(header).to_bytes(8, "little") + header + secret.encode()
        (tmp_path / "model.safetensors").write_bytes(content)
        if found:
            with pytest.raises(SecretError, match="model.safetensors"):
                refuse_secrets([tmp_path / "model.safetensors"])
        else:
            refuse_secrets([tmp_path / "model.safetensors"])


@pytest.mark.parametrize("file", ["README.md", "generation_config.json", "tokenizer.json"])
def test_upload_stops_before_any_request(
    hub: HubServer, api: HfApi, checkpoint: Path, code_root: Path, file: str
) -> None:
    write(checkpoint, {file: json.dumps({"note": SECRETS["hub"][0]})})
    for dry_run in (True, False):
        with pytest.raises(SecretError, match=file):
            push(checkpoint, "user/name", code_root=code_root, api=api, dry_run=dry_run)
    assert hub.requests == []


def test_secret_code_is_found(hub: HubServer, api: HfApi, checkpoint: Path, code_root: Path) -> None:
    write(code_root, {"processing_internvl.py": f"TOKEN = '{SECRETS['hub'][0]}'\n"})
    with pytest.raises(SecretError, match="processing_internvl.py, line 1"):
        push(checkpoint, "user/name", code_root=code_root, api=api)


def test_real_checkpoint_passes(tmp_path: Path) -> None:
    refuse_secrets(gather(ROOT / "checkpoints" / "internvl-tiny", tmp_path / "tiny"))


@pytest.mark.parametrize(
    "shard", [".env", "id_rsa", "trainer_state.json", "a\nb.safetensors", "/etc/passwd", ".x.safetensors"]
)
def test_index_cannot_name_other_files(checkpoint: Path, code_root: Path, shard: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    write(checkpoint, {"model.safetensors.index.json": json.dumps({"weight_map": {"a": shard}})})
    with pytest.raises(ValueError, match="no safetensors files of its folder"):
        push(checkpoint, "user/name", code_root=code_root, dry_run=True)
