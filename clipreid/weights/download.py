"""CLIP weights that open_clip knows by a tag, from its cache or the network.

    model.pretrained=openai ──▶ [download] ──▶ a local file ──▶ pretrained

Whether there is a network is asked once, for seconds: the client of the hub alone repeats itself for minutes.
Imports no torch until open_clip is asked.
"""

import contextlib
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from clipreid.errors import ModelError

ANSWER_S = 8.0
_REMEDY = "without a network give the path of a local file"


def fetch(pretrained: str, arch: str) -> Path:
    """The file of a tag's weights. Raises ModelError, one line, where it can be had neither here nor from afar."""
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    entry = get_pretrained_cfg(arch, pretrained)
    what = f"model.pretrained {pretrained!r}: the weights of {arch} could not be downloaded"
    if not _is_cached(entry) and (fault := _network_fault(entry)):
        raise ModelError(f"{what} ({fault}); {_REMEDY}")
    try:
        with _quiet():
            return Path(download_pretrained(entry))
    except Exception as error:  # open_clip and its hub client raise whatever their transports raise
        said = (str(error).strip() or "no message").splitlines()[0][:160]
        raise ModelError(f"{what} ({type(error).__name__}: {said}); {_REMEDY}") from None


def _is_cached(entry: dict[str, str]) -> bool:
    if hub := entry.get("hf_hub"):
        from huggingface_hub import try_to_load_from_cache

        repository, name = os.path.split(hub)
        names = [name] if name else ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"]
        names += [Path(one).with_suffix(".safetensors").name for one in names]
        return any(isinstance(try_to_load_from_cache(repository, one), str) for one in names)
    folder = Path("~/.cache/clip").expanduser()
    return (folder / entry.get("url", "").rpartition("/")[2]).is_file()


def _network_fault(entry: dict[str, str]) -> str:
    """Why the place of the weights does not answer; empty where it does, whatever it answers."""
    url = entry.get("url", "")
    if entry.get("hf_hub"):
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set, and they are not in the cache"
        url = constants.ENDPOINT
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_S):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return f"{url.split('?')[0]}: {getattr(error, 'reason', error)}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The hub's client tells each of its tries; what comes of them is told once."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
