"""Text the tests train tokenizers on, and text that tokenizers get wrong. All of it was written for these tests."""

from __future__ import annotations

ENGLISH = """\
A ziggurat is a stepped tower: every storey is smaller than the one below it, and the temple stands on top.
The builders dried their bricks in the sun, and they laid reed mats between the courses to keep the water out.
I've been told that it's easy, but we'll see; they're sure you'd like it, and I'm not. Don't you think so?
She said: "The keys (all 37 of them) cost 1,250.75 euros in 1998 – far too much!" He laughed... and paid.
Nobody knows how many people worked there; the tablets mention 12, 120, 1200 and once even 12000 workers.
The model reads the tokens, keeps the rows it needs, and forgets the others. The answer comes out word by word.
"""

SCRIPTS = """\
Башня стояла у реки, и каждый этаж был меньше предыдущего. Кирпичи сушили на солнце, а воду носили вёдрами.
Мы не знаем, сколько людей там работало: может быть, двести, а может быть, и две тысячи человек.
Ο πύργος έστεκε δίπλα στο ποτάμι και κάθε όροφος ήταν μικρότερος από τον προηγούμενο. Τι κάνεις; Καλά είμαι.
塔建在河边，每一层都比下面一层小。工人们把砖放在太阳下晒干。我们不知道有多少人在那里工作。
塔は川のそばに建っていて、上の階ほど小さくなる。レンガは太陽の下で乾かした。カタカナとひらがなと漢字。
탑은 강가에 서 있었고 층마다 아래층보다 작았다. 벽돌은 햇볕에 말렸다.
كان البرج يقف بجانب النهر وكان كل طابق أصغر من الطابق الذي تحته. جفف العمال الطوب تحت الشمس.
मीनार नदी के किनारे खड़ी थी और हर मंज़िल नीचे वाली मंज़िल से छोटी थी। मज़दूर ईंटों को धूप में सुखाते थे।
หอคอยตั้งอยู่ริมแม่น้ำ แต่ละชั้นเล็กกว่าชั้นล่าง คนงานตากอิฐไว้กลางแดด
המגדל עמד ליד הנהר, וכל קומה הייתה קטנה מהקומה שמתחתיה.
Der Turm stand am Fluß; für größere Höhen fehlten Ziegel. L'été, les ouvriers dormaient à côté. El niño soñó.
"""

CODE = """\
def area(width: float, height: float) -> float:
    \"\"\"Return the area of one storey.\"\"\"
    if width <= 0 or height <= 0:
        raise ValueError(f"no storey: {width} x {height}")
    return width * height

#include <stdio.h>
int main(void) {
\tfor (int i = 0; i < 10; ++i) {
\t\tprintf("%d: %s\\n", i, names[i]);
\t}
\treturn 0;
}

fn main() {
    let storeys: Vec<u32> = (1..=7).rev().collect();
    println!("{:?}", storeys.iter().map(|s| s * s).sum::<u32>());
}

SELECT name, COUNT(*) AS n FROM bricks WHERE dried = TRUE GROUP BY name HAVING n > 3;
<div class="tower"><a href="https://example.org/?q=1&amp;r=2#top">top</a></div>
const build = async (n) => { await lay(n); return n === 0 ? [] : [...build(n - 1), `brick ${n}`]; };
"""

ODDS = """\
🙂🙂 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇮🇶 🧱🧱🧱 ✅ ❤️ ①②③ ½ ² → ≤ ≠ ∑ € £ ¥ § © ™
0 1 2 3 4 5 6 7 8 9 10 11 12 42 99 100 123 256 1000 2024 4096 31337 65536 1234567 3.14159 1e-6 0xFF
a  b   c    d     e      f       g        h
\tone\ttwo\t\tthree\n\n\nfour\n  five\n    six\n        seven\r\neight
"""

TRAINING = (ENGLISH, SCRIPTS, CODE, ODDS)

# name -> text. All are NFC: llama.cpp normalises nothing, so it differs on decomposed text where a family composes it.
HARD_TEXTS: dict[str, str] = {
    "english": "Hello, world! It's 12345.67; DON'T we'LL  do  it? I've been 'told he's there, 'RE you sure?",
    "russian": "Привет, мир! Кирпичи сушили на солнце, 2024 год. ЗАГЛАВНЫЕ и строчные.",
    "greek": "Καλημέρα κόσμε, τι κάνεις; ΚΑΛΑ! 3½ ²",
    "chinese": "我想在2024年去北京，好吗？塔建在河边。",
    "japanese": "「日本語」カタカナ ひらがな、漢字。塔は川のそばに建っていて",
    "korean": "탑은 강가에 서 있었고 ㄱㄴ",
    "arabic": "كان البرج يقف بجانب النهر، ١٢٣٤",
    "hebrew": "המגדל עמד ליד הנהר",
    "mixed": "apple工作1314151天～ кирпич brick ziegel 벽돌 طوب",
    "python": "def f(x):\n    if x:\n        return {'a': [1, 2, 3]}  # comment\n\n\nclass A:\n\tpass\n",
    "c": '#include <stdio.h>\nint main(){printf("%d\\n",1<<3); return a->b != c::d;}\n',
    "html": '<div class="a">$x += `y` ~z|w^v &amp; {{ q }}</div>',
    "spaces": "a  b   c    d     e      f                g",
    "leading_space": " leading",
    "leading_spaces": "   three leading",
    "trailing_spaces": "trailing   ",
    "tabs_newlines": "a\t\tb \n c\n\n\nd   \n\t \n e\r\nf\r\n\r\n",
    "only_newlines": "\n\n\n",
    "only_spaces": "     ",
    "space": " ",
    "emoji": "🙂 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇮🇶🇫🇷 ✅️ ❤️ ①②",
    "unseen": "ꙮ 𒀭 𝔷𝔦𝔤 ⠿ 𓂀 \U0010fffd",
    "digits": "1 12 123 1234 12345 123456 1234567 12,345,678 3.3 3..3 3...3 007",
    "punctuation": "------======= ''''''```````\"\"\"\"......!!!!!!?????? (((]]]}} @#$%^&*",
    "long_word": "storey" * 300 + "Ziggurat" * 40,
    "control": "bell\x07 escape\x1b[0m delete\x7f unit\x1f separator",
    "wide_spaces": "a\u00a0b\u3000c\u2003d\u200be\ufeffg",
    "block": "a\u2581b c",
    "one_letter": "z",
    "ignored_merges": "The Ziggurat of Ur, a Ziggurat.",
}

# Marks after letters: llama.cpp's patterns for tekken and GPT-4o cut there where the original does not.
MARKED_TEXTS: dict[str, str] = {
    "hindi": "मीनार नदी के किनारे खड़ी थी, हिंदी में २०२४",
    "thai": "หอคอยตั้งอยู่ริมแม่น้ำ ภาษาไทย ง่าย",
    "vocalised_arabic": "مَرْحَبًا بالعالم",
}

PROMPT = (
    "The builders dried their bricks in the sun, and every storey was smaller than the one below it. "
    "def area(width, height):\n    return width * height\n"
    "Башня стояла у реки. 塔建在河边。 12, 120, 1200 bricks 🧱"
)
