"""Fine-tuning of Higgs Audio v2 for zero-shot voice cloning."""

import importlib.util

from trainer.codec import import_torchaudio

if importlib.util.find_spec("torchaudio") is not None:
    import_torchaudio()  # before anything here imports transformers, which imports an installed torchaudio
