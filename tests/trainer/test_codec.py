"""Loading an audio tokenizer, and codes of waveforms."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DacConfig, HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel, HubertConfig

from trainer.codec import (
    codec_frame_rate,
    codec_num_codebooks,
    codec_sampling_rate,
    encode_waveform,
    import_torchaudio,
    load_audio_tokenizer,
)
from trainer.demo.codec import DemonstrationCodec, DemonstrationCodecConfig

ROOT = Path(__file__).parents[2]


def _noise(seconds: float, sampling_rate: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(round(seconds * sampling_rate))
    return (0.1 * values).astype(np.float32)


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demonstration")
    config = DemonstrationCodecConfig(num_quantizers=3, codebook_size=16)
    DemonstrationCodec.fit([torch.from_numpy(_noise(3, 16000))], config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def higgs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny HiggsAudioV2TokenizerModel with random weights: 24 kHz, 960 samples a frame, 4 codebooks of 16."""
    ratios = [8, 5, 4, 2, 3]
    config = HiggsAudioV2TokenizerConfig(
        acoustic_model_config=DacConfig(
            encoder_hidden_size=2, decoder_hidden_size=64, downsampling_ratios=ratios, upsampling_ratios=ratios
        ),
        semantic_model_config=HubertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=[8] * 7,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
        ),
        target_bandwidths=[0.1, 0.4],
        codebook_size=16,
        codebook_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HiggsAudioV2TokenizerModel(config)
        for quantizer in model.quantizer.quantizers:
            quantizer.codebook.embed.normal_()
    path = tmp_path_factory.mktemp("higgs")
    model.save_pretrained(path)
    return path


def test_demonstration_codec_loads(demonstration: Path) -> None:
    codec = load_audio_tokenizer(str(demonstration))
    assert isinstance(codec, DemonstrationCodec)
    assert (codec_sampling_rate(codec), codec_num_codebooks(codec), codec_frame_rate(codec)) == (16000, 3, 25.0)


def test_higgs_tokenizer_loads(higgs: Path) -> None:
    codec = load_audio_tokenizer(str(higgs))
    assert isinstance(codec, HiggsAudioV2TokenizerModel)
    assert (codec_sampling_rate(codec), codec_num_codebooks(codec), codec_frame_rate(codec)) == (24000, 4, 25.0)


@pytest.mark.parametrize("kind", ["demonstration", "higgs"])
def test_codec_is_for_inference_only(kind: str, request: pytest.FixtureRequest) -> None:
    codec = load_audio_tokenizer(str(request.getfixturevalue(kind)), device="cpu")
    assert not any(module.training for module in codec.modules())
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    assert {parameter.dtype for parameter in codec.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["demonstration", "higgs"])
def test_waveform_to_codes_and_back(kind: str, request: pytest.FixtureRequest) -> None:
    codec = load_audio_tokenizer(str(request.getfixturevalue(kind)))
    rate, codebooks = codec_sampling_rate(codec), codec_num_codebooks(codec)
    samples = _noise(1.0, rate, seed=1)
    codes = encode_waveform(codec, samples)
    assert codes.shape == (codebooks, 25)
    assert (codes.dtype, codes.device.type, codes.is_inference()) == (torch.int64, "cpu", False)
    assert codes.unique().numel() > 1
    assert torch.equal(codes, codec.encode(torch.from_numpy(samples)[None, None]).audio_codes[0])

    waveform = codec.decode(codes[None]).audio_values
    assert waveform.dtype == torch.float32
    assert abs(waveform.shape[-1] - len(samples)) <= rate / codec_frame_rate(codec)
    assert waveform.isfinite().all()
    assert torch.equal(waveform, codec.decode(codes[None]).audio_values)


@pytest.mark.parametrize("shape", [(0,), (1, 100), ()])
def test_only_mono_waveforms_are_encoded(demonstration: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected a mono waveform"):
        encode_waveform(load_audio_tokenizer(str(demonstration)), np.zeros(shape, dtype=np.float32))


def test_nonfinite_samples_are_counted(demonstration: Path) -> None:
    samples = _noise(0.5, 16000)
    samples[[3, 70, 71]] = np.nan, np.inf, -np.inf
    with pytest.raises(ValueError, match="3 non-finite values among its 8000 samples"):
        encode_waveform(load_audio_tokenizer(str(demonstration)), samples)


def _refusal(path: Path) -> str:
    with pytest.raises(ValueError, match="save_pretrained") as caught:
        load_audio_tokenizer(str(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    assert "no such directory" in _refusal(tmp_path / "absent")


def test_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "codec.bin").write_bytes(b"")
    assert "is a file" in _refusal(tmp_path / "codec.bin")


def test_directory_without_configuration_is_refused(tmp_path: Path) -> None:
    assert "has no config.json" in _refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "of another world"}'])
def test_unusable_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "configuration" in _refusal(tmp_path)


def test_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "holds a model of type 'bert'" in _refusal(tmp_path)


def test_missing_weights_are_named(demonstration: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((demonstration / "config.json").read_bytes())
    assert "cannot load the weights" in _refusal(tmp_path)


def test_installed_torchaudio_resamples_in_a_fresh_process() -> None:
    script = (
        "from trainer.codec import import_torchaudio; import_torchaudio()\n"
        "import torch, torchaudio\n"
        "wave = torch.sin(torch.arange(24000) * 2 * torch.pi * 1000 / 24000)\n"
        "half = torchaudio.functional.resample(wave, 24000, 16000)\n"
        "assert half.shape == (16000,) and torch.fft.rfft(half).abs().argmax() == 1000\n"
        "from transformers import HiggsAudioV2TokenizerModel, Trainer\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def make_torchaudio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on the import path in which a test writes a torchaudio of its own."""

    def installed() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]

    kept = {name: sys.modules.pop(name) for name in installed()}
    (tmp_path / "torchaudio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "torchaudio"
    for name in installed():
        del sys.modules[name]
    sys.modules.update(kept)


def test_importable_torchaudio_is_left_alone(make_torchaudio: Path, caplog: pytest.LogCaptureFixture) -> None:
    (make_torchaudio / "__init__.py").write_text("from . import _extension\n")
    (make_torchaudio / "_extension.py").write_text("_IS_TORCHAUDIO_EXT_AVAILABLE = True\n")
    with caplog.at_level(logging.INFO):
        import_torchaudio()
    assert sys.modules["torchaudio._extension"]._IS_TORCHAUDIO_EXT_AVAILABLE is True
    assert not caplog.records


def test_broken_extension_is_left_out(make_torchaudio: Path, caplog: pytest.LogCaptureFixture) -> None:
    (make_torchaudio / "__init__.py").write_text("from . import part, _extension, functional\n")
    (make_torchaudio / "part.py").write_text("")
    (make_torchaudio / "_extension.py").write_text("raise OSError('libc10_cuda.so is missing')\n")
    (make_torchaudio / "functional.py").write_text(
        "from torchaudio._extension import _IS_TORCHAUDIO_EXT_AVAILABLE, fail_if_no_align\n"
        "@fail_if_no_align\ndef forced_align(): pass\n"
    )
    with caplog.at_level(logging.INFO):
        import_torchaudio()
        import_torchaudio()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "libc10_cuda.so is missing" in caplog.text
    torchaudio = sys.modules["torchaudio"]
    assert torchaudio._extension._IS_TORCHAUDIO_EXT_AVAILABLE is False
    with pytest.raises(RuntimeError, match="forced_align needs torchaudio's compiled extension"):
        torchaudio.functional.forced_align()


def test_torchaudio_broken_otherwise_says_so(make_torchaudio: Path) -> None:
    (make_torchaudio / "__init__.py").write_text("raise OSError('disk fault')\n")
    with pytest.raises(OSError, match="disk fault"):
        import_torchaudio()
