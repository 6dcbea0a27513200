"""Export to llama.cpp through its own converter, and the comparison of its files with the checkpoint."""
