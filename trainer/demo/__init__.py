"""A demonstration that needs no download: bundled clips, a codec fitted to them, and a small untrained checkpoint."""

from trainer.codec import import_torchaudio

import_torchaudio()  # before any module here imports from transformers
