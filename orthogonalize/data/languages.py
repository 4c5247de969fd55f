"""The language of a text by a light rule: its script, and in Latin letters the commonest small words of a language.

Enough to see that answers have come out in another language than their prompts. It says nothing of short texts, code,
numbers, mixtures and languages that it does not know, rather than guess.
"""

from __future__ import annotations

import re
from collections import Counter

LEAST_LETTERS = 8  # of a text in a script that tells its language
LEAST_WORDS = 2  # different small words of a language
LEAST_SHARE = 0.12  # of a text's words that are among them
LEAD = 1.25  # how many times as many different ones as of the next language
FENCED = re.compile(r"```.*?(```|$)", re.DOTALL)
WORD = re.compile(r"[^\W\d_]+")
SCRIPTS = {
    "Latin": r"A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "Cyrillic": r"\u0400-\u052f",
    "Greek": r"\u0370-\u03ff\u1f00-\u1fff",
    "Arabic": r"\u0600-\u06ff\u0750-\u077f",
    "Hebrew": r"\u0590-\u05ff",
    "Devanagari": r"\u0900-\u097f",
    "Bengali": r"\u0980-\u09ff",
    "Tamil": r"\u0b80-\u0bff",
    "Thai": r"\u0e00-\u0e7f",
    "Hangul": r"\u1100-\u11ff\uac00-\ud7af",
    "Japanese": r"\u3040-\u30ff",
    "Han": r"\u3400-\u9fff",
}
LETTERS = {script: re.compile(f"[{letters}]") for script, letters in SCRIPTS.items()}
# Words of one letter are left to English: others share them.
SMALL_WORDS = {
    "English": "the and of to in is that it for you with on are this be as was have not can or from by what how your "
    "at an will which their if they there do a i about me my we give write tell why where does should",
    "French": "le la les des et est une un du que qui dans pour pas sur avec vous ce il elle sont au plus ne par je "
    "nous votre de en comment quelle",
    "German": "der die das und ist ein eine nicht zu den von mit sich auf für im dem es auch ich sie wie werden oder "
    "kann bei einen sind was",
    "Spanish": "el la los las de que en un una es por con para no se del lo como su al más pero puede cómo qué son",
    "Italian": "il lo la gli le di che un una per non con del della è sono come si nel anche più questo in da",
    "Portuguese": "os as de que um uma em para não com do da por se no na mais como ou dos são você uma ao",
    "Dutch": "de het een en van is dat niet op te voor met zijn aan er ook als maar bij naar wordt kan je hoe wat",
    "Swedish": "och att det som en ett är på för inte med den av till har om kan du jag hur vad",
    "Polish": "na nie się że jest to jak po dla co ale od są oraz jako przez może",
    "Turkish": "ve bir bu için ile da de çok olarak daha ne gibi var mi nasıl olan",
    "Indonesian": "yang dan di untuk dengan dari ini itu adalah pada ke tidak dalam akan atau anda bisa",
    "Vietnamese": "và của là một có không được cho các với trong những bạn này để khi",
}
_SMALL = {language: frozenset(words.split()) for language, words in SMALL_WORDS.items()}


def language_of(text: str) -> str | None:
    """The language of a text, or its script where that has no small words here; None if the rule cannot tell."""
    text = FENCED.sub(" ", text)
    letters = Counter({script: len(pattern.findall(text)) for script, pattern in LETTERS.items()})
    total = letters.total()
    if total < LEAST_LETTERS:
        return None
    if letters["Japanese"] and letters["Han"] + letters["Japanese"] > total / 2:
        return "Japanese"  # which writes Han as well
    script, count = letters.most_common(1)[0]
    if count <= total / 2:
        return None
    return _latin(text) if script == "Latin" else script


def _latin(text: str) -> str | None:
    words = WORD.findall(text.lower())
    different = set(words)
    found = Counter({language: len(different & small) for language, small in _SMALL.items()})
    (first, count), (_, second) = found.most_common(2)
    share = sum(word in _SMALL[first] for word in words) / len(words)
    return first if count >= max(LEAST_WORDS, LEAD * second) and share >= LEAST_SHARE else None


def switches(prompt: str, answer: str) -> bool:
    """Whether an answer is in another language than its prompt, as far as the rule can tell."""
    asked, said = language_of(prompt), language_of(answer)
    return asked is not None and said is not None and asked != said
