"""Caption metrics of pycocoevalcap, each built by itself: BLEU 1-4, METEOR, ROUGE-L, CIDEr.

The PTB tokenizer and METEOR are Java programs inside pycocoevalcap. They are run here with its own command lines, but
with a time limit, in UTF-8 whatever the locale, and without writing into the installed package. Its wrappers wait for
ever when Java dies. Three things differ from them on purpose: every line break inside a caption becomes a space
(pycocoevalcap replaces the newline only, and the others shift all later captions by one), lone surrogates become "?",
and "|||", which METEOR takes for the end of a caption, is removed from references as it is from candidates.
"""

import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Literal

from mmcore.evaluation.confidence import Statistic, mean
from mmcore.evaluation.metrics import caption_statistics
from mmcore.evaluation.scores import EvaluationError

Tokenizer = Literal["auto", "ptb", "python", "none"]

# Whatever some reader on the way (Python, Java's tokenizer, Java's line reader) takes for the end of a line.
LINE_BREAKS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")

# 5000 pictures take METEOR 20 s on one core; this is for a machine that is badly overloaded, and ends what hangs.
JAVA_SECONDS = 300.0

# What PTB's tokenizer cuts, for `tokenize_python`.
_SPELLINGS = str.maketrans({"\u2018": "'", "\u2019": "'", "\u2013": " - ", "\u2014": " - ", "\u2026": " ... "})
_DOUBLE_QUOTES = re.compile("[\"\u201c\u201d]|''|``")
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
_JOINED = re.compile(r"\b(can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|gim(?=me\b)|lem(?=me\b))")
_TOKEN = re.compile(
    r"\w+://\S+"
    r"|(?:[a-z]\.){2,}"  # u.s.
    r"|(?:mr|mrs|ms|dr|st|ave|jr|sr|vs|etc)\."
    r"|n't|'(?:s|m|d|re|ve|ll)(?!\w)"
    r"|[-+]?\d+(?:[.,:/]\d+)+|(?<!\S)[-+]\d+"  # 1,000.50 and 5:30
    r"|[#@]?\w+(?:(?:[-/.'_&]|\.(?=\w))\w+)*"  # year-old, o'clock
    r"|[!?]+|[^\w\s]"
)
# PTB writes brackets as -LRB- and so on; its own lower-casing then hides them from pycocoevalcap's punctuation list.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionScores:
    """Metrics of all captions together, pycocoevalcap's numbers as they are."""

    metrics: dict[str, float]
    statistics: dict[str, Statistic]
    """Of each metric; of CIDEr with words weighed as in all the references."""
    cider: dict[str, float]
    """Of each caption, by id."""
    skipped: dict[str, str]
    scorer: dict[str, str]
    notes: tuple[str, ...]


def score_captions(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenizer: Tokenizer = "auto"
) -> CaptionScores:
    """Compute all metrics that this machine can.

    Args:
        candidates: one caption by id.
        references: at least one caption by id; the same ids.
        tokenizer: "auto" is "ptb" where Java runs and "python" where it does not; "none" takes captions as they are,
            tokens separated by spaces.
    Raises:
        ValueError: pycocoevalcap is not installed, or "ptb" was asked for and there is no Java.
        EvaluationError: the tokenizer's Java process failed.
    """
    assert candidates.keys() == references.keys(), "candidates and references must have the same ids"
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ValueError(
            f"caption metrics need pycocoevalcap ({error}): install mmcore with its extra `eval`"
        ) from None

    problem = java_problem()
    if tokenizer == "ptb" and problem:
        raise ValueError(f"--tokenizer ptb: {problem}. Install a Java runtime (17 works), or take --tokenizer python")
    chosen = ("python" if problem else "ptb") if tokenizer == "auto" else tokenizer
    skipped = {}
    if chosen != tokenizer and problem:
        skipped["PTB tokenizer"] = f"{problem}; a Python tokenizer stands in, which cuts most captions alike, not all"

    flat = [sanitise(text) for name in candidates for text in (candidates[name], *references[name])]
    tokenize = {"ptb": tokenize_ptb, "python": tokenize_python}.get(chosen, lambda captions: [*captions])
    tokens = iter(tokenize(flat))
    result: dict[str, list[str]] = {}
    truth: dict[str, list[str]] = {}
    for name in candidates:
        result[name] = [next(tokens)]
        truth[name] = [next(tokens) for _ in references[name]]

    bleu_scorer = BleuScorer(n=4)
    for name, texts in result.items():
        bleu_scorer += (texts[0], truth[name])
    bleu, _ = bleu_scorer.compute_score(option="closest", verbose=0)  # as pycocoevalcap's Bleu does
    rouge, rouges = Rouge().compute_score(truth, result)
    cider, ciders = Cider().compute_score(truth, result)
    metrics = {f"Bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
    statistics = caption_statistics.bleu(bleu_scorer.ctest)
    try:
        metrics["METEOR"], statistics["METEOR"] = meteor(
            [(texts[0], truth[name]) for name, texts in result.items()], problem
        )
    except EvaluationError as error:
        skipped["METEOR"] = str(error)
    metrics |= {"ROUGE_L": float(rouge), "CIDEr": float(cider)}
    statistics |= {"ROUGE_L": mean(rouges, 1.0), "CIDEr": mean(ciders, 1.0)}

    notes = [f"{name} left out: {reason}" for name, reason in skipped.items()]
    scorer = {"pycocoevalcap": metadata.version("pycocoevalcap"), "tokenizer": chosen}
    return CaptionScores(
        metrics=metrics,
        statistics=statistics,
        cider=dict(zip(result, map(float, ciders), strict=True)),
        skipped=skipped,
        scorer=scorer,
        notes=tuple(notes),
    )


def sanitise(text: str) -> str:
    """One line that can be written in UTF-8."""
    return LINE_BREAKS.sub(" ", text).encode("utf-8", "replace").decode()


def java_problem() -> str | None:
    """Why Java programs cannot be run here, or None."""
    java = shutil.which("java")
    if java is None:
        return "no Java runtime: there is no `java` on the PATH"
    try:
        subprocess.run([java, "-version"], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"no Java runtime: {java} does not run ({error})"
    return None


def tokenize_ptb(captions: Sequence[str]) -> list[str]:
    """Tokens of each caption, separated by spaces, as pycocoevalcap's PTBTokenizer makes them.

    Args:
        captions: each one line.
    Raises:
        EvaluationError: the Java process failed.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    program = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    # A line more than there are captions: it shows that none was lost or broken, at the end too.
    text = "".join(f"{caption}\n" for caption in chain(captions, ["end"]))
    try:
        done = subprocess.run(
            ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), *program],
            input=text.encode(),
            capture_output=True,
            check=True,
            timeout=JAVA_SECONDS + len(captions) / 1000,
        )
    except subprocess.CalledProcessError as error:
        raise _failed("the PTB tokenizer", f"ended with {error.returncode}", error.stderr) from None
    except subprocess.TimeoutExpired as error:
        raise _failed("the PTB tokenizer", f"took longer than {error.timeout:.0f} s") from None
    *lines, end = done.stdout.decode().rstrip("\n").split("\n")
    if end != "end" or len(lines) != len(captions):
        raise EvaluationError(
            f"the PTB tokenizer returned {len(lines)} lines for {len(captions)} captions, so that they cannot be told "
            "apart. --tokenizer python does without it"
        )
    return [_without_punctuation(line.rstrip().split(" ")) for line in lines]


def _failed(what: str, how: str, stderr: bytes = b"") -> EvaluationError:
    said = stderr.decode(errors="replace").strip().split("\n")[0]
    return EvaluationError(f"{what}'s Java process {how}{said and f' ({said})'}; --tokenizer python does without it")


def tokenize_python(captions: Sequence[str]) -> list[str]:
    """Tokens of each caption as PTB's rules cut ordinary captions; rare abbreviations and emoticons may differ."""
    return [_without_punctuation(_cut(caption)) for caption in captions]


def _cut(caption: str) -> list[str]:
    text = _DOUBLE_QUOTES.sub(" ", caption.lower().translate(_SPELLINGS))
    text = _JOINED.sub(r"\1 ", _CLITIC.sub(r" \1", text))
    return [_BRACKETS.get(token, token) for token in _TOKEN.findall(text)]


def _without_punctuation(tokens: Sequence[str]) -> str:
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    return " ".join(token for token in tokens if token not in PUNCTUATIONS)


def meteor(pairs: Sequence[tuple[str, Sequence[str]]], problem: str | None = None) -> tuple[float, Statistic]:
    """METEOR 1.5 of tokenised captions, through the jar's line protocol: SCORE for each, then EVAL of all.

    Also what its interval is drawn from.

    Args:
        pairs: candidate and references.
        problem: why there is no Java, as `java_problem` found it.
    Raises:
        EvaluationError: no Java, or its process failed or took too long.
    """
    if problem:
        raise EvaluationError(problem)
    from pycocoevalcap.meteor import meteor as official

    jar = Path(official.__file__).parent / official.METEOR_JAR
    command = ["java", "-Dfile.encoding=UTF-8", "-jar", "-Xmx2G", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    limit = JAVA_SECONDS + len(pairs) / 100
    with (
        tempfile.TemporaryFile() as complaints,  # a pipe that nobody empties would block Java
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, encoding="utf-8"
        ) as process,
    ):
        assert process.stdin and process.stdout
        deadline = time.monotonic() + limit
        watchdog = threading.Timer(limit, process.kill)
        watchdog.start()
        try:
            statistics = []
            for candidate, references in pairs:
                texts = [text.replace("|||", "").replace("  ", " ") for text in (*references, candidate)]
                print("SCORE", *texts, sep=" ||| ", file=process.stdin, flush=True)
                statistics.append(process.stdout.readline().strip())
            print("EVAL", *statistics, sep=" ||| ", file=process.stdin, flush=True)
            # One score for each caption, then that of all together.
            value = [float(process.stdout.readline()) for _ in range(len(pairs) + 1)][-1]
            return value, caption_statistics.meteor(statistics)
        except (OSError, ValueError):  # it is gone: a broken pipe, or an empty line where a number was due
            if time.monotonic() >= deadline:
                raise EvaluationError(f"METEOR's Java process took longer than {limit:.0f} s") from None
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().split("\n")[0]
            raise EvaluationError(f"METEOR's Java process ended with {process.returncode} ({said})") from None
        finally:
            watchdog.cancel()
            process.kill()
            with suppress(OSError):  # what could not be sent
                process.stdin.close()
