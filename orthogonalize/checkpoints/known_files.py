"""Which files beside the weights belong to a model: what an edit copies, what is downloaded, what a push uploads.

Everything else stays behind. It may be a second copy of the weights, which would still have what was edited out (there
is no list of all formats), or nobody else's business.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import PurePath

CONFIGURATION = ("config.json", "generation_config.json", "params.json", "configuration.json", "hf_quant_config.json")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "vocab.bpe", "normalizer.json", "encoder.json"),
    *("tokenizer.model", "tokenizer.model.v[0-9]*", "tokenizer_*.model", "*spiece.model", "sentencepiece*.model"),
    *("tiktoken.model", "*.tiktoken"),
)
PROCESSOR = (
    *("preprocessor_config.json", "*_preprocessor_config.json", "processor_config.json", "*_processor_config.json"),
    *("feature_extractor_config.json", "image_processor.json"),
)
TEMPLATES = ("*.jinja", "chat_template.json")
CODE = ("*.py",)  # of a class of the model's own
KNOWN = (*CONFIGURATION, *TOKENIZER, *PROCESSOR, *TEMPLATES, *CODE)
# Licences and notices: whatever the case, without an ending or as a text.
TERMS = re.compile(
    r"([\w.-]*licen[cs]e[\w.-]*|copying[\w.-]*|notice[\w.-]*|[\w.-]*use[_-]policy[\w.-]*|acceptable[_-]use[\w.-]*"
    r"|third[_-]?party[\w.-]*|authors|citation)(\.(txt|md|rst|html|pdf|cff))?",
    re.IGNORECASE,
)
TERMS_ENDINGS = ("", ".txt", ".md", ".rst", ".html", ".pdf", ".cff")
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
DRAFTS = ("mtp*.safetensors",)  # layers that predict further tokens, for speculative decoding
# What to download besides the weights, as the Hub's patterns; those know nothing of `TERMS`.
DOWNLOADED = (
    *KNOWN,
    *(
        f"{name}{ending}"
        for word in ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY", "THIRD_PARTY", "MODEL_LICENSE")
        for name in (word, word.capitalize(), word.lower())
        for ending in ("", "*.txt", "*.md", "*.pdf", "-[A-Z]*[A-Z]")
    ),
)


def is_known(name: PurePath, card: str = "") -> bool:
    """Whether a file of a model's folder, by its relative name, is one that an edited copy has as well.

    `card` is the text of the model card; the images that it shows belong to it.
    """
    if any(fnmatchcase(name.name, pattern) for pattern in KNOWN):
        return True
    if len(name.parts) == 1 and TERMS.fullmatch(name.name) and name.suffix.lower() in TERMS_ENDINGS:
        return True
    return name.suffix.lower() in IMAGES and bool(re.search(rf"(?<![\w.-]){re.escape(str(name))}(?![\w-])", card))


def is_weight_name(name: str) -> bool:
    """Whether an index may name this as a file of weights: a relative name that stays in its folder."""
    path = PurePath(name)
    return str(path) == name and name != "." and not path.is_absolute() and not {"..", "\0"} & {*path.parts, *name}
