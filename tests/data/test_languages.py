"""The language of a text by its script and small words, and answers in another one than their prompts."""

from __future__ import annotations

import pytest

from orthogonalize.data.languages import language_of, switches
from orthogonalize.data.prompts import load_prompts

TEXTS = {
    "English": "To bake a cake, mix the flour with two eggs, and leave it in the oven for an hour.",
    "French": "Pour faire un gâteau, mélangez la farine avec deux œufs et laissez le tout dans le four.",
    "German": "Für einen Kuchen mischt man das Mehl mit zwei Eiern und lässt ihn eine Stunde im Ofen.",
    "Spanish": "Para hacer un pastel, mezcla la harina con dos huevos y déjalo en el horno por una hora.",
    "Italian": "Per fare una torta si mescola la farina con due uova e si lascia nel forno per un'ora.",
    "Portuguese": "Para fazer um bolo, misture a farinha com dois ovos e deixe no forno por uma hora.",
    "Dutch": "Meng voor een taart het meel met twee eieren en laat het een uur in de oven staan.",
    "Swedish": "För att baka en kaka blandar du mjöl med två ägg och har den i ugnen en timme.",
    "Polish": "Aby upiec ciasto, mieszaj mąkę z dwoma jajkami i nie otwieraj piekarnika, to jest ważne.",
    "Turkish": "Kek yapmak için un ve iki yumurta ile bir hamur hazırlayın, bu çok kolay.",
    "Indonesian": "Untuk membuat kue, campurkan tepung dengan dua telur dan masukkan ke dalam oven.",
    "Vietnamese": "Để làm bánh, bạn trộn bột với hai quả trứng và cho vào lò trong một giờ.",
    "Cyrillic": "Чтобы испечь пирог, смешайте муку с двумя яйцами.",
    "Greek": "Για να φτιάξετε κέικ, ανακατέψτε το αλεύρι με δύο αυγά.",
    "Arabic": "لصنع كعكة اخلط الدقيق مع بيضتين",
    "Hebrew": "כדי לאפות עוגה מערבבים קמח עם שתי ביצים",
    "Devanagari": "केक बनाने के लिए आटे में दो अंडे मिलाएँ",
    "Thai": "ผสมแป้งกับไข่สองฟองเพื่อทำเค้ก",
    "Hangul": "케이크를 만들려면 밀가루와 달걀 두 개를 섞으세요",
    "Japanese": "小麦粉と卵を混ぜてケーキを焼きます。",
    "Han": "把面粉和两个鸡蛋混合，放进烤箱一个小时。",
}


@pytest.mark.parametrize("language", TEXTS)
def test_language_of_a_sentence(language):
    assert language_of(TEXTS[language]) == language


@pytest.mark.parametrize(
    "text", ["", "42", "Paris", "def f(x): return x + y * value", "Yes.", "```\nthe cat is on the\n```"]
)
def test_what_the_rule_cannot_tell_is_not_guessed(text):
    assert language_of(text) is None
    assert not switches(TEXTS["French"], text)
    assert not switches(text, TEXTS["French"])


def test_another_language_than_the_prompts_is_a_switch():
    for asked in TEXTS:
        for said in TEXTS:
            assert switches(TEXTS[asked], TEXTS[said]) == (asked != said), (asked, said)


def test_words_of_another_language_within_a_text_are_no_switch():
    answer = "The French word for cake is gâteau, and 'la farine' is the flour that you need for it."
    assert not switches(TEXTS["English"], answer)


@pytest.mark.parametrize("name", ["contrast_cooking.jsonl", "contrast_other.jsonl", "lists.jsonl", "sentences.jsonl"])
def test_prompts_of_the_demo_are_english_where_the_rule_tells(name):
    found = [language_of(prompt.text) for prompt in load_prompts(f"planted:{name}")]
    assert set(found) <= {"English", None}
    assert found.count("English") > 0.5 * len(found)
