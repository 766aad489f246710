"""The files that each engine reads: of a model that is there, or of random weights of a shape.

Random weights are written once, with one seed, into the user's cache, and each engine's own files
are made of them there; deleting the folder frees the room.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from qwenkit.bench.peers.spec import Options, WeightName, WeightSetting
from qwenkit.bench.process import Launch, prepare_files
from qwenkit.bench.random_model import write_random_folder, write_random_gguf
from qwenkit.bench.shapes import shape as shape_config
from qwenkit.errors import QwenkitError

OURS = "qwenkit"
GGUF_ENGINES = (OURS, "llama.cpp", "transformers")  # those that read a GGUF file as it is
_AS_STORED: dict[str, WeightSetting] = {  # what a storage is to an engine that has no GGUF
    "Q4_0": WeightSetting(name="int4", group_size=32),
    "Q8_0": WeightSetting(name="int8", group_size=32),
    "BF16": WeightSetting(name="bf16"),
    "F32": WeightSetting(name="fp32"),
}
_STORAGES: dict[WeightName, str] = {"int4": "Q4_0", "int8": "Q8_0", "bf16": "BF16", "fp32": "F32"}
_HEADS: dict[WeightName, str] = _STORAGES | {"int4": "Q8_0"}  # llama.cpp's own for a tied Q4_0

Report = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What all engines measure: `model`, or random weights of `shape` held as `weights` say, or
    stored in a GGUF file as `storage` says.
    """

    model: Path | None = None
    shape: str | None = None
    weights: WeightSetting | None = None
    storage: str = "Q4_0"

    @property
    def name(self) -> str:
        """For titles."""
        if self.model is not None:
            return self.model.name
        return f"{self.shape}-{self.weights.label if self.weights else self.storage}"

    def peer_weights(self) -> WeightSetting | None:
        """What a peer that has no GGUF holds; None where nothing is said."""
        if self.weights is not None or self.model is not None:
            return self.weights
        return _AS_STORED.get(self.storage)


def launch_for(
    engine: str, python: str, source: Source, options: Options, cache: Path, report: Report
) -> Launch:
    """How to start `engine` on `source`, its files made where they are missing.

    Raises QwenkitError when the engine cannot have this model.
    """
    weights = source.weights if engine == OURS else source.peer_weights()
    ready = replace(options, weights=weights)
    if source.model is None:
        assert source.shape is not None
        return _of_shape(engine, python, source, ready, cache, report)
    is_gguf = source.model.is_file()
    if is_gguf and engine in GGUF_ENGINES:
        return Launch(engine, python, source.model, ready)
    if is_gguf or engine == "llama.cpp":
        wanted = "a .gguf file" if engine == "llama.cpp" else "a folder in the hub's layout"
        raise QwenkitError(f"{engine} needs {wanted}, or random weights: --shape and --weights.")
    known = hashlib.sha256(str(source.model.resolve()).encode()).hexdigest()[:12]
    own_files = cache / "converted" / f"{source.model.name}-{known}"
    return _converted(Launch(engine, python, source.model, ready), own_files, report)


def _of_shape(
    engine: str, python: str, source: Source, options: Options, cache: Path, report: Report
) -> Launch:
    assert source.shape is not None
    home = cache / "random" / source.shape
    stored = source.weights is None and engine in (OURS, "llama.cpp")
    if stored or engine == "llama.cpp":
        storage = head = source.storage
        if source.weights is not None:
            storage = _STORAGES[source.weights.name]
            head = _HEADS[source.weights.name]
            if source.weights.head is not None:
                head = _STORAGES[source.weights.head]
        path = _random_gguf(source.shape, storage, head, home, report)
        return Launch(engine, python, path, options)
    if options.weights is None and engine != "transformers":
        raise QwenkitError(f"{engine} does not know {source.storage}: name --weights.")
    folder = random_folder(source.shape, home, report)
    return _converted(Launch(engine, python, folder, options), home, report)


def _converted(launch: Launch, home: Path, report: Report) -> Launch:
    """With the engine's own files, for those engines that need some."""
    weights = launch.options.weights
    needs_own = launch.engine in ("onnxruntime", "openvino") or (
        launch.engine == "vllm" and weights is not None and weights.name in ("int4", "int8")
    )
    if not needs_own:
        return launch
    if weights is None:
        raise QwenkitError(f"{launch.engine} converts the model: say to what with --weights.")
    target = home / f"{launch.engine}-{weights.label}"
    if not target.exists():
        report(f"converting for {launch.engine}", 0.0)
        with _fresh(target) as place:
            prepare_files(launch, place)
    return replace(launch, model=target)


def _random_gguf(name: str, storage: str, head: str, home: Path, report: Report) -> Path:
    path = home / (f"{storage}.gguf" if head == storage else f"{storage}-head-{head}.gguf")
    if not path.exists():
        with _fresh(path) as place:
            write_random_gguf(
                place,
                shape_config(name),
                storage=storage,
                head_storage=head,
                progress=lambda share: report("writing weights", share),
            )
    return path


def random_folder(name: str, home: Path, report: Report) -> Path:
    """The folder below `home` with random weights of a published shape, written if it is missing.

    Raises UsageError for an unknown shape.
    """
    folder = home / "checkpoint"
    if not folder.exists():
        with _fresh(folder) as place:
            write_random_folder(
                place, shape_config(name), progress=lambda share: report("writing weights", share)
            )
    return folder


@contextmanager
def _fresh(target: Path) -> Iterator[Path]:
    """A place beside `target` that becomes it when all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".making-"))
    try:
        yield folder / target.name
        (folder / target.name).replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
