"""The language tools behind CHAIR, Object HalBench and AMBER, each as a plain function so that tests can inject recorded outputs.

A missing package or model is an error with the install command: another tokenizer, tagger or similarity would silently
change the numbers. `pip install -r requirements-eval.txt` brings the packages; models and corpora come on top.
"""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

from common.errors import InputError

Tokenize = Callable[[str], list[str]]
Tag = Callable[[str], list[tuple[str, str]]]
Similarity = Callable[[str, str], float]

_CORPORA = {
    "punkt_tab": "tokenizers/punkt_tab",
    "wordnet": "corpora/wordnet",
    "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng",
}


def _nltk(*corpora: str) -> ModuleType:
    try:
        import nltk
    except ModuleNotFoundError:
        raise InputError("this benchmark needs nltk: pip install -r requirements-eval.txt") from None
    for name in corpora:
        try:
            nltk.data.find(_CORPORA[name])
        except LookupError:
            try:
                nltk.data.find(_CORPORA[name] + ".zip")
            except LookupError:
                needed = " ".join(corpora)
                raise InputError(f"nltk has no {name}: python -m nltk.downloader {needed}") from None
    return nltk


def _spacy(model: str) -> Callable[[str], Any]:
    try:
        import spacy
    except ModuleNotFoundError:
        raise InputError(
            f"this benchmark needs spaCy: pip install -r requirements-eval.txt && python -m spacy download {model}"
        ) from None
    try:
        return spacy.load(model)
    except OSError:
        raise InputError(f"spaCy has no model {model}: python -m spacy download {model}") from None


def tokenizer() -> Tokenize:
    """nltk's word_tokenize."""
    return _nltk("punkt_tab").word_tokenize


def noun_lemmatizer() -> Callable[[str], str]:
    """WordNet lemma of a word taken as a noun."""
    nltk = _nltk("wordnet")
    return lru_cache(maxsize=None)(nltk.stem.WordNetLemmatizer().lemmatize)


def singularizer() -> Callable[[str], str]:
    """The singularize of `pattern`, with which CHAIR was defined; it damages words (glass -> glas) and must."""
    _nltk("wordnet")  # pattern tries to download it at import
    try:
        from pattern.text.en import singularize
    except ModuleNotFoundError:
        raise InputError("CHAIR needs pattern's singularize: pip install -r requirements-eval.txt") from None
    return lru_cache(maxsize=None)(singularize)


def noun_tagger() -> Tag:
    """(token, Penn tag) of nltk's perceptron tagger."""
    nltk = _nltk("punkt_tab", "averaged_perceptron_tagger_eng")
    return lambda text: nltk.pos_tag(nltk.word_tokenize(text))


def word_similarity() -> Similarity:
    """Cosine of the word vectors of spaCy's en_core_web_lg."""
    parse = lru_cache(maxsize=None)(_spacy("en_core_web_lg"))
    return lru_cache(maxsize=None)(lambda a, b: parse(a).similarity(parse(b)))


def phrase_tagger() -> Tag:
    """(lemma, Penn tag) of spaCy's en_core_web_trf."""
    parse = _spacy("en_core_web_trf")
    return lambda text: [(token.lemma_, token.tag_) for token in parse(text)]
