"""What a token dataset is: the columns of its Parquet shards and the names of its files.

`part-*.parquet` hold rows, `rejects/part-*.parquet` what was left out (id, stage, reason, detail), and `dataset.json`, which
appears last, says what is there. Columns: `id`, `tokens` (fixed_size_list<uint16>[H·W], row-major), `caption`,
`width`, `height` and `aesthetic` of the original as far as the source knew them, `sha256`, and if asked for

- `clip_text`, `clip_image`: fixed_size_list<float16>[D], NaN in rows that have none (pyarrow 25 writes a null there but
  cannot read it, apache/arrow#35692);
- `byt5`: list<float16> of L·D encoder states, and `byt5_length`, which is L;
- `phash`: a perceptual hash, uint64.

Schema metadata (`paella.*`) has grid, codebook size, VQGAN digest, names and widths of the encoders and the format version.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

FORMAT_VERSION = 1
CLIP_COLUMNS = ("clip_text", "clip_image")
REJECTS = pa.schema([(name, pa.string()) for name in ("id", "stage", "reason", "detail")])


def shard_name(unit: str) -> str:
    """The output shard of a unit."""
    return f"part-{unit}.parquet"


def unit_name(shard: str) -> str:
    """The unit of an output shard."""
    return shard.removeprefix("part-").removesuffix(".parquet")


@dataclass(frozen=True, kw_only=True)
class TokenFormat:
    """What a shard's schema metadata says."""

    grid_height: int
    grid_width: int
    codebook_size: int
    vqgan_digest: str
    clip_embd: int | None = None
    """Width of the CLIP embeddings; None where there are none."""
    clip_columns: tuple[str, ...] = CLIP_COLUMNS
    """Which CLIP columns there are, where clip_embd says that there are any."""
    clip: str | None = None
    """The CLIP's name, or the digest of its files."""
    byt5_embd: int | None = None
    """Width of the text encoder's states; None where there are none."""
    byt5: str | None = None
    """The text encoder's name, or the digest of its files."""
    phash: bool = False
    """Whether there are perceptual hashes."""

    def schema(self) -> pa.Schema:
        clip = pa.list_(pa.float16(), self.clip_embd or 1)
        optional = [pa.field(name, clip, nullable=False) for name in self.clip_columns if self.clip_embd is not None]
        if self.byt5_embd is not None:
            optional += [pa.field("byt5", pa.list_(pa.float16()), nullable=False), pa.field("byt5_length", pa.int32())]
        if self.phash:
            optional.append(pa.field("phash", pa.uint64()))
        return pa.schema(
            [
                pa.field("id", pa.string(), nullable=False),
                pa.field("tokens", pa.list_(pa.uint16(), self.grid_height * self.grid_width), nullable=False),
                pa.field("caption", pa.string(), nullable=False),
                pa.field("width", pa.int32()),
                pa.field("height", pa.int32()),
                pa.field("aesthetic", pa.float32()),
                pa.field("sha256", pa.string()),
                *optional,
            ],
            metadata=self._metadata(),
        )

    def _metadata(self) -> dict[str, str]:
        values = {name: value for name, value in vars(self).items() if value is not None and not isinstance(value, tuple | bool)}
        return {"paella.format_version": str(FORMAT_VERSION)} | {f"paella.{name}": str(value) for name, value in values.items()}

    @classmethod
    def of(cls, schema: pa.Schema, where: str) -> TokenFormat:
        """Raises ValueError where the schema is not a token dataset's."""
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        if metadata.get("paella.format_version") != str(FORMAT_VERSION):
            raise ValueError(f"{where} is not a token dataset of format {FORMAT_VERSION}")

        def number(name: str) -> int | None:
            return int(metadata[f"paella.{name}"]) if f"paella.{name}" in metadata else None

        return cls(
            grid_height=int(metadata["paella.grid_height"]),
            grid_width=int(metadata["paella.grid_width"]),
            codebook_size=int(metadata["paella.codebook_size"]),
            vqgan_digest=metadata["paella.vqgan_digest"],
            clip_embd=number("clip_embd"),
            clip_columns=tuple(name for name in CLIP_COLUMNS if name in schema.names),
            clip=metadata.get("paella.clip"),
            byt5_embd=number("byt5_embd"),
            byt5=metadata.get("paella.byt5"),
            phash="phash" in schema.names,
        )
