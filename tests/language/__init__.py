"""What of the PyTorch language works under `backend="aicc"`: one file per theme, one test per row, one table for all in docs/language.md."""
