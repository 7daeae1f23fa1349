"""Soft accuracy of VQA: an answer is as right as people gave it, after answers are normalised. Four rules are in use.

- `vqa`, of VQAv2 and OK-VQA: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py at commit a013f00. One
  of the (ten) people is left out at a time; right is min(1, same/3) of the others, and the mean of that counts: said by
  one of ten .3, by two .6, by three .9, by four and more 1. **Nothing is normalised where all people agree**: "Yes." is
  wrong where everybody says "yes".
- `vizwiz`: the VizWiz API's vqaEval.py of January 2023 (read in public copies of it). The answer is always normalised,
  those of people never are. Its table of contractions writes most apostrophes as U+2019, so that "dont" is never right.
- `m4c`, of TextVQA, whose authors' it is: EvalAIAnswerProcessor and TextVQAAccuracyEvaluator of facebookresearch/mmf,
  which haotian-liu/LLaVA has in llava/eval/m4c_evaluator.py at commit c121f04. All answers are always normalised;
  before that "," and "?" are removed and "'s" is cut off as a word.
- `min3`, of most trainers: min(1, same/3) of all people, all answers always normalised. NVIDIA/Megatron-LM,
  examples/multimodal/evaluation/evaluate_vqav2.py at commit d98e8a6.

Official numbers are rounded to two digits of a percent; these are not.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

Rule = Literal["vqa", "vizwiz", "m4c", "min3"]

# Of every task that has them: `official` is the rule of the benchmark's own authors.
MODES = ("official", "vqa", "m4c", "min3")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMBERS = dict(
    zip(
        ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
        ("0", *map(str, range(11))),
        strict=True,
    )
)
# Some digits with a comma between them, and dots that no digit follows. The official pattern of dots also looks back,
# by a slip at the literal characters "<=" that cannot be there.
_THOUSANDS = re.compile(r"\d,\d")
_DOT = re.compile(r"\.(?!\d)")
# The official call gives re.UNICODE, which is 32, where the number of replacements stands.
_NUM_DOTS = int(re.UNICODE)

# Pairs of what is replaced and what replaces it. Words are in lower case by then: those with capitals never occur.
_CONTRACTIONS = re.findall(
    r"\S+",
    """
aint ain't arent aren't cant can't couldve could've couldnt couldn't couldn'tve couldn't've couldnt've couldn't've
didnt didn't doesnt doesn't dont don't hadnt hadn't hadnt've hadn't've hadn'tve hadn't've hasnt hasn't havent haven't
hed he'd hed've he'd've he'dve he'd've hes he's howd how'd howll how'll hows how's Id've I'd've I'dve I'd've Im I'm
Ive I've isnt isn't itd it'd itd've it'd've it'dve it'd've itll it'll let's let's maam ma'am mightnt mightn't
mightnt've mightn't've mightn'tve mightn't've mightve might've mustnt mustn't mustve must've neednt needn't notve
not've oclock o'clock oughtnt oughtn't ow's'at 'ow's'at 'ows'at 'ow's'at 'ow'sat 'ow's'at shant shan't shed've
she'd've she'dve she'd've she's she's shouldve should've shouldnt shouldn't shouldnt've shouldn't've shouldn'tve
shouldn't've somebody'd somebodyd somebodyd've somebody'd've somebody'dve somebody'd've somebodyll somebody'll
somebodys somebody's someoned someone'd someoned've someone'd've someone'dve someone'd've someonell someone'll
someones someone's somethingd something'd somethingd've something'd've something'dve something'd've somethingll
something'll thats that's thered there'd thered've there'd've there'dve there'd've therere there're theres there's
theyd they'd theyd've they'd've they'dve they'd've theyll they'll theyre they're theyve they've twas 'twas wasnt
wasn't wed've we'd've we'dve we'd've weve we've werent weren't whatll what'll whatre what're whats what's whatve
what've whens when's whered where'd wheres where's whereve where've whod who'd whod've who'd've who'dve who'd've wholl
who'll whos who's whove who've whyll why'll whyre why're whys why's wont won't wouldve would've wouldnt wouldn't
wouldnt've wouldn't've wouldn'tve wouldn't've yall y'all yall'll y'all'll y'allll y'all'll yall'd've y'all'd've
y'alld've y'all'd've y'all'dve y'all'd've youd you'd youd've you'd've you'dve you'd've youll you'll youre you're youve
you've
""",
)
CONTRACTIONS = dict(zip(_CONTRACTIONS[::2], _CONTRACTIONS[1::2], strict=True))
# VizWiz's: these words, and what replaces those, have kept their straight apostrophes.
_STRAIGHT = {"couldn'tve", "hadn'tve"}
_STRAIGHTENED = {"aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove"}
CONTRACTIONS_VIZWIZ = {
    (word if word in _STRAIGHT else word.replace("'", "\u2019")): (
        whole if word in _STRAIGHTENED else whole.replace("'", "\u2019")
    )
    for word, whole in CONTRACTIONS.items()
}


def accuracy(answer: str, people: Sequence[str], rule: Rule) -> tuple[float, str]:
    """How right an answer is, 0 to 1, and what the rule compares of it with what people say, one of them at least."""
    if rule == "min3":
        parsed = normalise(answer)
        return min(1.0, sum(normalise(said) == parsed for said in people) / 3), parsed
    if rule == "m4c":
        parsed, people = m4c(answer), [m4c(said) for said in people]
    elif rule == "vizwiz":
        parsed = normalise(_folded(answer), is_vizwiz=True)
    else:
        parsed, people = _folded(answer), [_folded(said) for said in people]
        if len(set(people)) > 1:
            parsed, people = normalise(parsed), [normalise(said) for said in people]
    same = sum(said == parsed for said in people)
    return sum(min(1.0, (same - (said == parsed)) / 3) for said in people) / len(people), parsed


@lru_cache(maxsize=1 << 16)
def normalise(text: str, is_vizwiz: bool = False) -> str:
    """Without punctuation, articles and capitals; numbers up to ten as digits, contractions with their apostrophes.

    Punctuation is removed where the same sign touches a space anywhere or digits have commas between them, and is a
    space otherwise: "left,right" are two words, "10,000" is one.
    """
    bare, is_thousands = text, _THOUSANDS.search(text) is not None
    for sign in _PUNCTUATION:
        if sign in text:
            is_removed = is_thousands or f"{sign} " in text or f" {sign}" in text
            bare = bare.replace(sign, "" if is_removed else " ")
    words = (_NUMBERS.get(word, word) for word in _DOT.sub("", bare, count=_NUM_DOTS).lower().split())
    table = CONTRACTIONS_VIZWIZ if is_vizwiz else CONTRACTIONS
    return " ".join(table.get(word, word) for word in words if word not in _ARTICLES)


def m4c(text: str) -> str:
    """As `normalise`, after commas and question marks are removed and "'s" is cut off."""
    return normalise(_folded(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()))


def _folded(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
