"""Audio files of every kind are read right, and every bad one is refused with its reason."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.audio import AudioError, AudioInfo, AudioMissingError, check_audio, content_key, probe_audio, read_audio


def sine(frequency: float, sampling_rate: int, frames: int, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * frequency * np.arange(frames) / sampling_rate)).astype(np.float32)


def dominant_frequency(samples: np.ndarray, sampling_rate: int) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * sampling_rate / len(samples))


def middle_level(samples: np.ndarray) -> float:
    """Amplitude of a sine from its power, away from the ends where a resampler's filter has no neighbours."""
    quarter = len(samples) // 4
    return float(np.sqrt(2 * np.mean(samples[quarter:-quarter].astype(np.float64) ** 2)))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
@pytest.mark.parametrize("source_rate", [8_000, 44_100, 48_000])
@pytest.mark.parametrize("target_rate", [16_000, 24_000])
def test_resampling_keeps_frequency_length_and_level(
    tmp_path: Path, name: str, source_rate: int, target_rate: int
) -> None:
    frames = source_rate + 7
    soundfile.write(tmp_path / name, sine(440, source_rate, frames), source_rate)

    samples = read_audio(tmp_path / name, target_rate)

    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert abs(len(samples) - frames * target_rate / source_rate) <= 1
    assert dominant_frequency(samples, target_rate) == pytest.approx(440, abs=1.5)
    assert middle_level(samples) == pytest.approx(0.5, rel=0.01)


def test_resampling_removes_what_the_lower_rate_cannot_hold(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "high.wav", sine(15_000, 48_000, 48_000), 48_000)

    assert middle_level(read_audio(tmp_path / "high.wav", 16_000)) < 1e-3


@given(frames=st.integers(1, 5000), source_rate=st.sampled_from([8_000, 22_050, 44_100, 48_000]))
@settings(max_examples=30)
def test_resampled_length_is_within_one_sample(
    tmp_path_factory: pytest.TempPathFactory, frames: int, source_rate: int
) -> None:
    file = tmp_path_factory.mktemp("length") / "a.wav"
    soundfile.write(file, np.full(frames, 0.25, np.float32), source_rate)

    samples = read_audio(file, 24_000)

    assert abs(len(samples) - frames * 24_000 / source_rate) <= 1
    assert np.isfinite(samples).all()


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("sampling_rate", [None, 16_000])
def test_without_resampling_the_samples_are_the_files_own(
    tmp_path: Path, subtype: str, sampling_rate: int | None
) -> None:
    expected = np.array([0.0, 0.5, -0.5, 0.25, -1.0], np.float32)
    soundfile.write(tmp_path / "a.wav", expected, 16_000, subtype=subtype)

    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", sampling_rate), expected)


def test_channels_are_averaged(tmp_path: Path) -> None:
    channels = np.array([[1.0, 0.0, 0.5], [-0.5, 0.5, 0.0], [0.25, 0.25, 0.25]], np.float32)
    soundfile.write(tmp_path / "three.wav", channels, 24_000, subtype="FLOAT")

    np.testing.assert_allclose(read_audio(tmp_path / "three.wav", None), [0.5, 0.0, 0.25], rtol=1e-6)


def test_opposite_channels_cancel_after_resampling(tmp_path: Path) -> None:
    left = sine(440, 44_100, 44_100)
    soundfile.write(tmp_path / "opposite.flac", np.stack([left, -left], axis=1), 44_100, subtype="PCM_24")

    assert np.abs(read_audio(tmp_path / "opposite.flac", 24_000)).max() < 1e-6


@pytest.mark.parametrize(("name", "subtype"), [("a.wav", "PCM_24"), ("a.flac", "PCM_24"), ("a.ogg", "VORBIS")])
def test_probe_states_what_the_header_says(tmp_path: Path, name: str, subtype: str) -> None:
    soundfile.write(tmp_path / name, np.zeros((22_050, 2)), 44_100, subtype=subtype)

    info = probe_audio(tmp_path / name)

    assert info == AudioInfo(frames=22_050, sampling_rate=44_100, channels=2)
    assert info.seconds == 0.5
    assert check_audio(str(tmp_path / name)) == info


def test_probe_reads_the_header_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.flac"
    soundfile.write(file, np.random.default_rng(0).uniform(-1, 1, 48_000), 48_000)
    file.write_bytes(file.read_bytes()[:20_000])

    assert probe_audio(file).frames == 48_000
    with pytest.raises(AudioError, match=r"a\.flac: is not readable audio \(.*lost sync"):
        read_audio(file, None)


def write_unknown_length(file: Path) -> None:
    """A FLAC file as an encoder leaves it that wrote to a pipe: total samples 0 in its STREAMINFO block."""
    soundfile.write(file, np.zeros(4800), 48_000)
    data = bytearray(file.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    file.write_bytes(data)


def write_nonfinite(file: Path, subtype: str = "FLOAT") -> None:
    samples = np.zeros((100, 2))
    samples[3, 0], samples[50, 1], samples[51, 1] = np.nan, np.inf, -np.inf
    soundfile.write(file, samples, 24_000, subtype=subtype, format="WAV")


BAD_FILES = {
    "missing.wav": (lambda file: None, "no such file"),
    "folder.wav": (Path.mkdir, "is a directory"),
    "pipe.wav": (os.mkfifo, "is a device or a pipe"),
    "empty.wav": (Path.touch, r"is an empty file \(0 bytes\)"),
    "text.wav": (lambda file: file.write_text("hello " * 20), r"is not readable audio \(Format not recognised\)"),
    "samples.raw": (
        lambda file: file.write_bytes(b"12" * 99),
        r"is not readable audio \(raw samples without a header\)",
    ),
    "none.wav": (lambda file: soundfile.write(file, np.zeros(0), 24_000), "holds no samples"),
    "none.ogg": (lambda file: soundfile.write(file, np.zeros(0), 24_000), "holds no samples"),
    "piped.flac": (write_unknown_length, "does not state its length"),
}


@pytest.mark.parametrize("name", sorted(BAD_FILES))
def test_bad_files_are_refused_with_their_name_and_reason(tmp_path: Path, name: str) -> None:
    make, reason = BAD_FILES[name]
    make(tmp_path / name)

    for read in (probe_audio, check_audio, lambda file: read_audio(file, 24_000)):
        with pytest.raises(AudioError, match=reason) as caught:
            read(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_nonfinite_samples_are_counted(tmp_path: Path, subtype: str) -> None:
    write_nonfinite(tmp_path / "nan.wav", subtype)

    for read in (check_audio, lambda file: read_audio(file, None)):
        with pytest.raises(AudioError, match=r"nan\.wav: 3 of 200 samples are NaN or infinite"):
            read(tmp_path / "nan.wav")
    assert probe_audio(tmp_path / "nan.wav").frames == 100


def test_nonfinite_samples_are_found_beyond_the_first_block(tmp_path: Path) -> None:
    samples = np.zeros(600_000, np.float32)
    samples[[1, -1]] = np.nan
    soundfile.write(tmp_path / "long.wav", samples, 48_000, subtype="FLOAT")

    with pytest.raises(AudioError, match="2 of 600000 samples"):
        check_audio(tmp_path / "long.wav")


def test_loud_channels_do_not_overflow_in_the_average(tmp_path: Path) -> None:
    loud = np.full((4, 2), 3e38, np.float32)
    soundfile.write(tmp_path / "loud.wav", loud, 24_000, subtype="FLOAT")

    np.testing.assert_array_equal(read_audio(tmp_path / "loud.wav", None), loud[:, 0])


@pytest.mark.parametrize("name", ["a\0b.wav", "half\ud83d.wav", "x" * 300 + ".wav", "file.wav/inside.wav"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.wav").write_bytes(b"x")

    with pytest.raises(AudioMissingError):
        probe_audio(tmp_path / name)


def test_unicode_names(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "صوت المتحدث.wav", sine(440, 24_000, 240), 24_000)

    assert len(read_audio(tmp_path / "صوت المتحدث.wav", None)) == 240


@pytest.mark.parametrize("sampling_rate", [0, -24_000])
def test_a_rate_must_be_positive(tmp_path: Path, sampling_rate: int) -> None:
    with pytest.raises(ValueError, match=f"sampling_rate must be positive, got {sampling_rate}"):
        read_audio(tmp_path / "a.wav", sampling_rate)


def test_content_key_depends_on_the_bytes_alone(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "a.wav").write_bytes(data)
    (tmp_path / "b.flac").write_bytes(data)
    (tmp_path / "c.wav").write_bytes(data[:-1])

    assert content_key(tmp_path / "a.wav") == hashlib.sha256(data).hexdigest()
    assert content_key(tmp_path / "a.wav") == content_key(tmp_path / "b.flac")
    assert content_key(tmp_path / "a.wav") != content_key(tmp_path / "c.wav")
    with pytest.raises(AudioMissingError, match="no such file"):
        content_key(tmp_path / "d.wav")


def test_errors_survive_the_way_back_from_a_worker_process(tmp_path: Path) -> None:
    with pytest.raises(AudioMissingError) as caught:
        probe_audio(tmp_path / "a.wav")

    copied = pickle.loads(pickle.dumps(caught.value))
    assert type(copied) is AudioMissingError
    assert str(copied) == str(caught.value)


# RAW has no header, SD2 a second file. DWVW cannot be read from a stream; VOC, WVE and XI round or fix the rate.
WRITTEN = [
    (kind, subtype)
    for kind in soundfile.available_formats()
    for subtype in soundfile.available_subtypes(kind)
    if kind not in ("RAW", "SD2", "VOC", "WVE", "XI")
    and soundfile.check_format(kind, subtype)
    and "DWVW" not in subtype
]


@pytest.mark.parametrize("channels", [1, 8])
def test_whatever_libsndfile_writes_is_read(tmp_path: Path, channels: int) -> None:
    read = set()
    for kind, subtype in WRITTEN:
        file = tmp_path / f"{kind}_{subtype}"
        tone = np.repeat(sine(440, 16_000, 4_000)[:, None], channels, axis=1)
        try:
            soundfile.write(file, tone, 16_000, format=kind, subtype=subtype)
        except soundfile.SoundFileError:  # not for so many channels
            continue
        info, samples = check_audio(file), read_audio(file, 24_000)
        assert (info.sampling_rate, info.channels) == (16_000, channels), file.name
        assert 4_000 <= info.frames <= 6_500, file.name  # whole blocks
        assert abs(len(samples) - info.frames * 1.5) <= 1, file.name
        assert dominant_frequency(samples[:6_000], 24_000) == pytest.approx(440, abs=6), file.name
        # Opus is told how eight channels surround a listener, and makes them of unequal level.
        assert middle_level(samples[:6_000]) == pytest.approx(0.5, rel=0.13 if subtype == "OPUS" else 0.06), file.name
        read.add((kind, subtype))
    assert len(read) > 55


@given(
    st.sampled_from(["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"]),
    st.sampled_from([8_000, 24_000, 96_000, 192_000]),
    st.integers(1, 8),
    st.integers(1, 3_000),
    st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_samples_are_those_of_the_file_at_any_rate_kind_and_number_of_channels(
    tmp_path_factory: pytest.TempPathFactory, subtype: str, rate: int, channels: int, frames: int, seed: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.wav"
    written = np.random.default_rng(seed).uniform(-1, 1, (frames, channels))
    soundfile.write(file, written, rate, subtype=subtype)
    step = {"PCM_U8": 2**-6, "PCM_16": 2**-14}.get(subtype, 1e-6)
    assert check_audio(file) == AudioInfo(frames, rate, channels)
    np.testing.assert_allclose(read_audio(file, rate), written.mean(1), atol=step)


OTHERS = {
    "a.m4a": (b"\0\0\0\x20ftypM4A " + bytes(99), r"is MPEG-4 audio .* convert it to WAV or FLAC \(`ffmpeg"),
    "named.wav": (b"\0\0\0\x18ftypisom" + bytes(99), "is MPEG-4 audio"),
    "a.webm": (b"\x1aE\xdf\xa3" + bytes(99), "is Matroska audio .webm, mkv., which is not read"),
    "a.aac": (b"\xff\xf1" + bytes(99), "is AAC audio"),
    "a.amr": (b"#!AMR\n" + bytes(99), "is AMR audio"),
    "a.wma": (bytes.fromhex("3026b2758e66cf11") + bytes(99), "is Windows Media audio"),
    "lfs.wav": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS.*git lfs pull"),
    "page.wav": (b"<!DOCTYPE html><html>404", "is a web page, not audio"),
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_what_is_not_read_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    data, reason = OTHERS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(AudioError, match=rf"{re.escape(name)}: {reason}"):
        check_audio(tmp_path / name)


def test_room_is_made_for_what_is_there_and_not_for_what_a_header_states(tmp_path: Path) -> None:
    file = tmp_path / "w.wav"
    soundfile.write(file, sine(440, 16_000, 1_000), 16_000, format="AU", subtype="G721_32")
    data = bytearray(file.read_bytes())
    data[8:12] = b"\x7f\xff\xff\xff"  # bytes of samples
    file.write_bytes(data)
    assert 1_000 <= len(read_audio(file, None)) < 2_000
    soundfile.write(file, sine(440, 16_000, 1_000), 16_000)
    data = bytearray(file.read_bytes())
    data[40:44] = b"\xff\xff\xff\x7f"
    file.write_bytes(data)
    assert len(read_audio(file, None)) == 1_000


@pytest.mark.parametrize("gain", [32_768.0, 1e38])
def test_integers_written_as_floats_are_refused(tmp_path: Path, gain: float) -> None:
    soundfile.write(tmp_path / "loud.wav", sine(440, 16_000, 1_000).astype(np.float64) * gain, 16_000, subtype="DOUBLE")
    with pytest.raises(AudioError, match=r"loud\.wav: samples reach .*, where full scale is 1"):
        check_audio(tmp_path / "loud.wav")
    soundfile.write(tmp_path / "hot.wav", 4 * sine(440, 16_000, 1_000), 16_000, subtype="FLOAT")
    assert check_audio(tmp_path / "hot.wav").frames == 1_000


def test_a_clip_that_leaves_no_sample_at_the_rate_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "fast.wav", np.zeros(100), 2**31 - 1)
    with pytest.raises(AudioError, match=r"fast\.wav: is 4\.7e-08 s long, so that no sample is left of it at 24000 Hz"):
        read_audio(tmp_path / "fast.wav", 24_000)


def test_messages_do_not_steer_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(AudioError) as caught:
        check_audio(tmp_path / "a\x1b[2J\n\u202e.wav")
    assert str(caught.value).endswith(r"a\x1b[2J\x0a\u202e.wav: no such file")
