"""How answers are scored, from 0 to 1, each by the usual measure of its data set."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def plain(text: str) -> str:
    """Lower case, without punctuation, articles and repeated white space (SQuAD)."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", letters).split())


def f1(given: str, accepted: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of words, of LongBench's question answering (Bai et al., arXiv 2308.14508)."""
    return max((_overlap(plain(given).split(), plain(answer).split()) for answer in accepted), default=0.0)


def first_line_f1(given: str, accepted: Sequence[str]) -> float:
    """The same of the answer's first line: what follows are further questions, in the manner of the examples."""
    return f1(given.lstrip("\n").split("\n")[0], accepted)


def number(given: str, accepted: Sequence[str]) -> float:
    """The share of the elements given that are the right one, of LongBench's passage retrieval and count."""
    found = re.findall(r"\d+", given)
    right = {found for answer in accepted for found in re.findall(r"\d+", answer)[-1:]}
    return sum(one in right for one in found) / len(found) if found else 0.0


def all_found(given: str, accepted: Sequence[str]) -> float:
    """The share of the answers that occur in what was given, of RULER's retrieval, tracking and aggregation."""
    return sum(answer.lower() in given.lower() for answer in accepted) / len(accepted)


def any_found(given: str, accepted: Sequence[str]) -> float:
    """Whether one of the answers occurs in what was given, of RULER's question answering."""
    return float(any(answer.lower() in given.lower() for answer in accepted))


def _overlap(given: list[str], answer: list[str]) -> float:
    common = sum((Counter(given) & Counter(answer)).values())
    return 2 * common / (len(given) + len(answer)) if common else 0.0
