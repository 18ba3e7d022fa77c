"""Makes the demonstration clips: ``python -m trainer.demo.synthesize`` (needs ``espeak-ng`` on the PATH).

The clips and their manifest are part of the package, so nobody needs to run this to run the demonstration. Every
speaker says the same four sentences of their language: the text never tells the voice.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

CLIPS_DIRECTORY = Path(__file__).parent / "clips"
MANIFEST_NAME = "manifest.json"

_SILENCE_BELOW_PEAK = 10 ** (-40 / 20)
_MARGIN_SECONDS = 0.03

logger = logging.getLogger(__name__)

SENTENCES: dict[str, tuple[str, ...]] = {
    "en": ("The red fox runs home.", "She reads by the river.", "Rain falls on the roof.", "We sail at first light."),
    "ar": ("القمر جميل الليلة.", "نحن نحب القراءة.", "الطفل يلعب هنا.", "نشرب الشاي صباحا."),
    "es": ("El gato duerme al sol.", "Mañana vamos a la playa.", "La casa tiene jardín.", "Me gusta el pan fresco."),
}


@dataclass(frozen=True)
class Speaker:
    """One demonstration voice.

    Attributes:
        language: key of :data:`SENTENCES`.
        voice: espeak-ng language and voice variant, such as ``en-us+m3``.
        pitch: espeak-ng pitch, 0 to 99.
        speed: words a minute.
        split: ``train`` or ``eval``; a voice is in one of them only.
    """

    language: str
    voice: str
    pitch: int
    speed: int
    split: str

    @property
    def name(self) -> str:
        """The voice as part of a file name."""
        return self.voice.replace("+", "-").lower()


SPEAKERS: tuple[Speaker, ...] = (
    Speaker("en", "en-us+m3", 35, 185, "train"),
    Speaker("en", "en-gb+f2", 65, 190, "train"),
    Speaker("en", "en-gb-scotland+m7", 50, 180, "train"),
    Speaker("en", "en-us+f4", 80, 180, "eval"),
    Speaker("ar", "ar+m1", 30, 190, "train"),
    Speaker("ar", "ar+f4", 75, 200, "train"),
    Speaker("ar", "ar+m6", 55, 205, "train"),
    Speaker("ar", "ar+f3", 60, 185, "eval"),
    Speaker("es", "es+m5", 40, 195, "train"),
    Speaker("es", "es+f1", 70, 190, "train"),
    Speaker("es", "es-419+m2", 25, 185, "train"),
    Speaker("es", "es-419+f5", 85, 200, "eval"),
)


@dataclass(frozen=True)
class Clip:
    """One line of the manifest. ``file`` is relative to the manifest."""

    file: str
    speaker: str
    language: str
    transcript: str
    seconds: float
    split: str


def read_manifest(directory: Path = CLIPS_DIRECTORY) -> list[Clip]:
    """The clips listed in a directory's manifest, in its order."""
    return [Clip(**entry) for entry in json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))]


def trim_silence(samples: np.ndarray, sampling_rate: int) -> np.ndarray:
    """``samples`` (float32 ``[n]``) without the leading and trailing part more than 40 dB below the peak.

    A margin of 30 ms is kept. Raises ValueError when every sample is zero.
    """
    loud = np.flatnonzero(np.abs(samples) > np.abs(samples).max(initial=0.0) * _SILENCE_BELOW_PEAK)
    if loud.size == 0:
        raise ValueError("the clip is silent: nothing to trim it to")
    margin = round(_MARGIN_SECONDS * sampling_rate)
    return samples[max(0, loud[0] - margin) : loud[-1] + 1 + margin]


def synthesize(directory: Path = CLIPS_DIRECTORY) -> list[Clip]:
    """Write every clip as 16-bit mono FLAC at espeak-ng's own rate, and the manifest, into ``directory``.

    Raises:
        RuntimeError: when espeak-ng is not installed.
        subprocess.CalledProcessError: when espeak-ng fails.
    """
    if shutil.which("espeak-ng") is None:
        raise RuntimeError("espeak-ng is not on the PATH; install it (Debian: apt install espeak-ng) and run again")
    directory.mkdir(parents=True, exist_ok=True)
    lines = [(speaker, *said) for speaker in SPEAKERS for said in enumerate(SENTENCES[speaker.language], start=1)]
    clips = [_write_clip(directory, *line) for line in tqdm(lines, desc="synthesizing", unit="clip")]
    manifest = json.dumps([asdict(clip) for clip in clips], ensure_ascii=False, indent=1)
    (directory / MANIFEST_NAME).write_text(manifest + "\n", encoding="utf-8")
    return clips


def _write_clip(directory: Path, speaker: Speaker, number: int, sentence: str) -> Clip:
    samples, sampling_rate = _speak(speaker, sentence)
    trimmed = trim_silence(samples, sampling_rate)
    name = f"{speaker.name}-{number}.flac"
    soundfile.write(directory / name, trimmed, sampling_rate, subtype="PCM_16")
    seconds = round(len(trimmed) / sampling_rate, 3)
    return Clip(name, speaker.name, speaker.language, sentence, seconds, speaker.split)


def _speak(speaker: Speaker, sentence: str) -> tuple[np.ndarray, int]:
    command = ["espeak-ng", "-v", speaker.voice, "-p", str(speaker.pitch), "-s", str(speaker.speed), "--stdout"]
    wav = subprocess.run([*command, sentence], check=True, capture_output=True).stdout
    samples, sampling_rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    return samples, sampling_rate


def main() -> None:
    """Write the clips into the package and say how much there is."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    clips = synthesize()
    seconds = sum(clip.seconds for clip in clips)
    logger.info("wrote %d clips, %.1f s of speech, to %s", len(clips), seconds, CLIPS_DIRECTORY)


if __name__ == "__main__":
    main()
