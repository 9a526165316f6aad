"""The documents of a logical stream as positions, their images sampled: each depends on its key alone."""

import numpy as np

from megafusion.data.config import DataConfig
from megafusion.data.document_format import BadDocument
from megafusion.data.sampling import sample_layout, sample_noise
from megafusion.data.source import DOCUMENT, Source, counter_generator
from megafusion.data.stream_state import DocumentKey
from megafusion.errors import UserError
from megafusion.images.reader import BadImage
from megafusion.objective.noise_process import NoiseProcess
from megafusion.sequence.document import FlatDocument, flatten
from megafusion.sequence.packing import SequenceShape
from megafusion.sequence.tokenizer import Tokenizer


class StreamDocuments:
    """Whole documents, read when they are first asked for and kept until `keep_only` drops them."""

    def __init__(
        self,
        stream: int,
        sources: dict[str, Source],
        config: DataConfig,
        shape: SequenceShape,
        tokenizer: Tokenizer,
        noise_process: NoiseProcess,
    ):
        self._stream, self._sources, self._config = stream, sources, config
        self._shape, self._tokenizer, self._noise_process = shape, tokenizer, noise_process
        self._image_ids = tokenizer.image_ids(len(shape.sizes))
        # Beside a document the generator that samples its images, None once it has.
        self._kept: dict[DocumentKey, tuple[FlatDocument, np.random.Generator | None]] = {}

    def get(self, key: DocumentKey) -> FlatDocument:
        """The document, its images sampled or not. Raises BadDocument."""
        if key not in self._kept:
            self._kept[key] = self._load(key)
        return self._kept[key][0]

    def get_sampled(self, key: DocumentKey) -> FlatDocument:
        """The document with every image sampled, in order: no sample depends on where the document is cut."""
        document = self.get(key)
        generator = self._kept[key][1]
        if generator:
            manifest = self._sources[key.source].folder.manifest
            document = sample_noise(
                document, manifest, self._config, self._shape, self._noise_process, generator
            )
            self._kept[key] = document, None
        return document

    def keep_only(self, keys: set[DocumentKey]) -> None:
        """Drop the other documents; one that is asked for again is read again."""
        self._kept = {key: value for key, value in self._kept.items() if key in keys}

    def _load(self, key: DocumentKey) -> tuple[FlatDocument, np.random.Generator]:
        source = self._sources[key.source]
        index = source.document_at(self._stream, key.epoch, key.order)
        generator = counter_generator(source.seed, source.number, index, key.epoch, DOCUMENT)
        stored = source.folder.read(index)
        where = f"{source.folder.folder}, document {index}"
        source.check(stored, where)
        try:
            segments = sample_layout(stored, source.folder.manifest, self._config, self._shape, generator)
        except BadImage as error:
            raise BadDocument(where, str(error)) from error
        texts = [segment.data for segment in segments if segment.kind == "tokens"]
        if max((text.max(initial=0) for text in texts), default=0) >= self._tokenizer.num_text_ids:
            raise BadDocument(where, "a token that the tokenizer does not have")
        if any(np.isin(text, self._image_ids).any() for text in texts):
            raise BadDocument(where, "a text with a token that begins or ends images")
        document = flatten(
            segments,
            self._tokenizer,
            self._shape.patches,
            self._shape.causal_images,
            self._shape.clean_context,
        )
        copies = 0 if document.copies is None else document.copies
        longest = int((document.image_end - document.image_start + copies).max(initial=0)) + 4
        if longest > self._shape.length:
            raise UserError(
                f"{where} ({stored.metadata.get('caption', '')[:60]!r}): an image takes {longest} positions "
                "with bos, boi, eoi and eos and does not fit in data.sequence_length "
                f"{self._shape.length}; raise it"
            )
        return document, generator
