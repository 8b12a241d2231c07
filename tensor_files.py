"""How are tensors stored in files, and read back intact? Apart from weights.py, which knows what they mean.

    8 bytes: n | n bytes JSON: {"name": {"dtype": "BF16", "shape": [2432, 64], "data_offsets": [a, b]}, ..
    and then nothing but numbers                                          (safetensors: nothing here can run)

    transformer/diffusion_pytorch_model.safetensors                         one file, or of a large model
    transformer/diffusion_pytorch_model-00001-of-00002.safetensors ...      several, and
    transformer/diffusion_pytorch_model.safetensors.index.json              which tensor is in which

What the tensors mean is the business of weights.py; here are only names, shapes and bytes. A `Source` has
all names and shapes of its files at once and reads the numbers one tensor at a time; files are written in the
same way, under a temporary name, flushed to disk and renamed.

What surprises
- Nothing is ever unpickled: .ckpt, .pt and .bin files are refused. A file that cannot be opened is looked at
  once more for what it may be instead: a pickle, a web page, a git-lfs pointer, a truncated file.
- A mapped page, once read, counts as this process's memory until the file is closed: it is reopened every
  REOPEN bytes, or a model would seem to be in memory twice.
- float8 with scales is multiplied by them as it is read. Two spellings of their keys are in use.

Run `python tensor_files.py`: writes three shards, reads them back, and shows what damaged ones say.
"""
import itertools
import json
import math
import os
import re
import struct
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from layouts import assembled_shape

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
SCALES = (".scale_weight", ".weight_scale")         # two spellings of scaled float8
REOPEN = 256 * 2**20                                # bytes


class CheckpointError(ValueError):
    """A file that cannot be used; the message is one line with cause and remedy."""


def files_in(folder, pattern="*.safetensors") -> list[Path]:
    """Sorted, without what macOS puts beside each file on other systems' drives."""
    return sorted(p for p in Path(folder).glob(pattern) if not p.name.startswith("._"))


def write_atomically(path, write) -> None:
    """write(temporary path), then fsync, rename and fsync of the folder: the file at `path` is the old
    one or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)              # safetensors makes files that only their owner can read
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path) -> None:
    """A rename survives a power cut only once its folder has reached the disk too."""
    if os.name == "posix":                      # elsewhere a folder cannot be opened
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_writable(folder) -> None:
    """ValueError unless files can be written into this folder, which need not exist yet."""
    folder = Path(folder).absolute()
    there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{there} is no folder to write to: change that, or choose another --out")


def write_json(path, value) -> None:
    write_atomically(
        path, lambda p: p.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------- reading

class Source:
    """The tensors of a part, in one or several safetensors files: names and shapes at once, numbers one
    tensor at a time. index: key without prefix -> (file, shape, dtype's name)."""

    def __init__(self, files, config=None):
        self.path, self.config, self.prefix = Path(files[0]), config or {}, ""
        self.index, self.others, self.opened, self.since = {}, set(), None, 0
        for file in files:
            with open_safetensors(file) as f:
                for key in f.keys():
                    if key in self.index:
                        raise CheckpointError(f"{key} is in {file} and in {self.index[key][0]}: "
                                              "the folder mixes two models, download it again")
                    part = f.get_slice(key)
                    self.index[key] = (file, tuple(part.get_shape()), part.get_dtype())

    def select(self, prefix):
        """Keep only the keys with this prefix, the part's own, in the index; remember the others."""
        self.prefix = prefix
        self.others = {k for k in self.index if not k.startswith(prefix)}
        self.index = {k[len(prefix):]: v for k, v in self.index.items() if k.startswith(prefix)}

    def shape(self, recipe):
        """The shape of what the Recipe gives; None if one of its keys is missing."""
        if any(key not in self.index for key in recipe.keys):
            return None
        return assembled_shape(recipe.op, [self.index[key][1] for key in recipe.keys])

    def count(self, pattern) -> int:
        """One more than the largest number in the place of {} in any key."""
        found = (re.match(re.escape(pattern).replace(r"\{\}", r"(\d+)"), key) for key in self.index)
        count = max((int(m[1]) + 1 for m in found if m), default=0)
        if count > len(self.index):
            raise CheckpointError(f"{self.path} has a {pattern.format(count - 1)} and only {len(self.index)} "
                                  "tensors: it is damaged, get it again")
        return count

    def scale_key(self, key):
        """In scaled float8, the key of the scale by which to multiply this weight."""
        stem = key.removesuffix(".weight")
        return next((stem + s for s in SCALES if stem + s in self.index), None) if stem != key else None

    def read(self, key) -> torch.Tensor:
        """The tensor of a key, on the CPU, mapped from its file, which is reopened now and then: pages once
        read count as this process's memory until then, as if the model were there twice."""
        file = self.index[key][0]
        if self.opened != file or self.since > REOPEN:
            self.handle = self.opened = None            # never two maps at once
            self.handle, self.opened, self.since = open_safetensors(file), file, 0
        t = self.handle.get_tensor(self.prefix + key)
        self.since += t.numel() * t.element_size()
        if (scale := self.scale_key(key)) is None:
            return t
        other = self.index[scale][0]                                        # it may be in another shard
        handle = self.handle if other == file else open_safetensors(other)
        scale = handle.get_tensor(self.prefix + scale).float()
        return t.float() * scale.reshape(-1, *[1] * (t.ndim - 1))           # one number, or one for each row


def opened(path):
    """safetensors' reader of a file. On Windows it maps nothing: all of a mapped file counts as memory there
    (transformers #48285)."""
    return safe_open(path, framework="pt", **({"backend": "pread"} if os.name == "nt" else {}))


def open_safetensors(path):
    try:
        return opened(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise CheckpointError(f"{path} {what_is_wrong(Path(path), e)}") from None


def what_is_wrong(path, error) -> str:
    """Why a file cannot be opened as safetensors: what it is instead, and what to do about it."""
    if not path.is_file():
        return "is a folder where a file was expected" if path.is_dir() else "is missing, or not a plain file"
    try:
        with open(path, "rb") as f:
            head = f.read(16)
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return ("is a pickled file (.ckpt, .pt, .bin): those can run any code and are never opened here; "
                "get the model as .safetensors")
    if head[:4] == b"GGUF":
        return "is a GGUF file, whose quantised formats are not read here: get the model as .safetensors"
    if head.startswith(b"version https:"):
        return "is only a pointer to the real file: run  git lfs pull  in its folder"
    if head.lstrip()[:1] == b"<":
        return "is a web page: the download needs a login or an accepted licence, do it again with one"
    n, size = int.from_bytes(head[:8], "little"), path.stat().st_size
    with suppress(UnicodeDecodeError):
        words = path.read_bytes().decode().split() if size < 4096 else []
        if words and all(word.isprintable() for word in words):
            return (f'is a text, not weights, and says "{" ".join(words)[:200]}": get the file again, with a '
                    "login if it asks for one")
    if head[8:9] == b"{" and n <= 100_000_000:
        how = "cut short or too long" if size < 8 + n or "ncomplete" in str(error) else "damaged"
        return f"is {how} ({size:,} bytes; {error}): download it again"
    return f"is not a safetensors file ({error}): get the model as .safetensors"


def read_config(folder, name="config.json") -> dict:
    """The settings of a part of a diffusers folder; {} if there are none."""
    path = Path(folder, name)
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON ({e}): download it again") from None
    return config if isinstance(config, dict) else {}


def files_of_part(folder) -> list[Path]:
    """The safetensors files of one part of a diffusers folder, all its shards; [] if there are none."""
    for stem in ("diffusion_pytorch_model", "model"):
        whole = [p for v in ("", ".fp16", ".bf16") if (p := folder / f"{stem}{v}.safetensors").is_file()]
        indexes = sorted(folder.glob(f"{stem}*safetensors.index*.json"), key=lambda p: len(p.name))
        if whole and (whole[0].name == f"{stem}.safetensors" or not indexes):
            return whole[:1]
        for index in indexes:
            with suppress(CheckpointError):             # perhaps another's shards are there
                return shards(index)
        if whole:
            return whole[:1]
        if indexes:
            return shards(indexes[0])                   # raises, and says why
    return []


def shards(index) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{index} is not a list of shards ({e!r}): download it again") from None
    for name in names:
        if Path(str(name)).name != name or not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is not there: download the folder again")
    return [index.parent / name for name in sorted(names)]


# ---------------------------------------------------------------------------------------------------- writing

def write_safetensors(path, shapes, tensors) -> None:
    """shapes: {key: (dtype's name, shape)}. tensors: one for each key, in this order; an iterator may make
    each when it is needed, so that only one has to be in memory at a time."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, (dtype, shape) in shapes.items():
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                             # tensors begin at a multiple of 8 bytes

    def write(temporary):
        with open(temporary, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for (key, (dtype, shape)), t in zip(shapes.items(), tensors, strict=True):
                if (DTYPES[dtype], tuple(shape)) != (t.dtype, tuple(t.shape)):
                    raise ValueError(f"{key} is {t.dtype} {tuple(t.shape)}, announced {dtype} {tuple(shape)}")
                f.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    write_atomically(path, write)


def write_shards(folder, stem, shapes, tensors, most) -> list[Path]:
    """Like write_safetensors, but into files of at most `most` bytes of tensors each (a larger tensor gets a
    file to itself), named as diffusers and transformers name them. -> the files."""
    groups, filled = [{}], 0
    for key, (dtype, shape) in shapes.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        if groups[-1] and filled + size > most:
            groups, filled = [*groups, {}], 0
        groups[-1][key] = dtype, shape
        filled += size
    folder, n, tensors = Path(folder), len(groups), iter(tensors)
    names = [f"{stem}-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)] if n > 1 else [
        f"{stem}.safetensors"]
    there = files_in(folder) + files_in(folder, "*.safetensors.index*.json")
    if others := [p.name for p in there if [p.name] != names]:
        raise CheckpointError(f"{folder} holds {others[0]} already, and a mixture of two models might be "
                              "read: choose another folder, or empty this one")
    for name, group in zip(names, groups):
        write_safetensors(folder / name, group, itertools.islice(tensors, len(group)))
    if n > 1:
        total = sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in shapes.values())
        write_json(folder / f"{stem}.safetensors.index.json", {
            "metadata": {"total_size": total},
            "weight_map": {key: name for name, group in zip(names, groups) for key in group}})
    return [folder / name for name in names]


def demo():
    from tempfile import TemporaryDirectory
    g = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}.weight": torch.randn(8, 3 + i, generator=g) for i in range(4)}
    shapes = {key: ("F32", t.shape) for key, t in tensors.items()}
    with TemporaryDirectory(ignore_cleanup_errors=True) as tmp:         # Windows keeps files that are mapped
        files = write_shards(tmp, "model", shapes, tensors.values(), 250)
        print(*(f"{f.name}: {f.stat().st_size} bytes" for f in files), sep="\n")
        source = Source(files_of_part(Path(tmp)))
        assert len(files) == 3 and all(torch.equal(source.read(key), t) for key, t in tensors.items())
        for title, data in (("cut short", files[0].read_bytes()[:-1]), ("a pickle", b"\x80\x04N."),
                            ("a web page", b"<!doctype html>"), ("text", b"not a model")):
            Path(tmp, "x").write_bytes(data)
            try:
                open_safetensors(Path(tmp, "x"))
            except CheckpointError as e:
                print(f"{title}: {str(e).replace(tmp, '...')}")
            else:
                raise AssertionError(f"{title} was opened")


# Exercises. (1) Never reopen the file in Source.read, and watch the process's memory while a large model is
# loaded. (2) Leave out `others` in write_shards: write a model in three shards, then another in one, and load
# the first one's index.

if __name__ == "__main__":
    demo()
