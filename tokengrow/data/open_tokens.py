"""Tokens of a run or of a checkpoint: token stores, tokenised text, or Megatron files."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tokengrow.checkpoint.schema import TokensFrom
from tokengrow.checkpoint.store import Checkpoint
from tokengrow.data.corpus import Text
from tokengrow.data.megatron_source import MegatronConfig, MegatronSource
from tokengrow.data.mixture import MixtureConfig, open_store, prepare_mixture
from tokengrow.data.sections import (
    MEGATRON,
    MIXTURE,
    Section,
    resolve_corpus,
    resolve_megatron,
    resolve_mixture,
    resolve_tokenizer,
)
from tokengrow.data.sequences import TokenSource
from tokengrow.data.store import TokenStore, prepare_store
from tokengrow.data.stored_text import StoredText
from tokengrow.data.tokenizer import Tokenizer, prepare_tokenizer
from tokengrow.errors import UserError
from tokengrow.paths import cache_dir


@dataclass(frozen=True, kw_only=True)
class TokensRequest:
    """Tokens that a run needs."""

    origin: TokensFrom
    """Sections of the recipe that name them."""
    vocab_size: int
    """Size of the smallest vocabulary among the models of the run."""
    tokenizer: Tokenizer | None
    """Tokenizer of the checkpoint that the run starts from; None: there is none."""
    context_length: int
    """Largest context length among the models, in tokens."""
    samples: int
    """Sequences that the run trains on, for the order of Megatron files."""
    seed: int
    """Seed of the data order."""


def check_vocabulary(vocab_size: int, model_vocab_size: int) -> None:
    """Raise `UserError` if a tokenizer has more entries than a model has embedding rows."""
    if vocab_size > model_vocab_size:
        raise UserError(
            f"model.vocab_size must be at least {vocab_size}, the size of the tokenizer's "
            f"vocabulary, got {model_vocab_size}. Raise it, or choose a smaller tokenizer."
        )


def open_tokens(request: TokensRequest, console: Console) -> TokenSource:
    """Open the tokens of a run; tokenise text and train a tokenizer first if they are not cached.

    Args:
        request: the tokens.
        console: receives progress and a summary.

    Raises:
        UserError: the sections name no tokens, or tokens that do not fit the models.
    """
    origin = request.origin
    if origin.store:
        return open_store(Path(origin.store))
    if files := resolve_megatron(origin.data):
        return _open_megatron(files, request, console)
    if mixture := resolve_mixture(origin.data):
        return _open_mixture(mixture, request, console)
    corpus = resolve_corpus(origin.data)
    tokenizer = _given_tokenizer(request) or _trained_tokenizer(request, corpus, console)
    store = prepare_store(corpus, tokenizer, cache_dir())
    console.print(
        f"data: {len(store.split('train')):,} training and {len(store.split('validation')):,} "
        f"validation tokens in {store.folder}",
        highlight=False,
        soft_wrap=True,
    )
    return store


def _open_mixture(config: MixtureConfig, request: TokensRequest, console: Console) -> TokenSource:
    """Open several stores of one tokenizer; build those of text in the cache."""
    tokenizer = _given_tokenizer(request) or config.stored_tokenizer()
    tokenizer = tokenizer or _trained_tokenizer(request, config.text, console)
    mixture = prepare_mixture(config, tokenizer, cache_dir())
    for line in mixture.summary_lines():
        console.print(f"data: {line}", highlight=False, soft_wrap=True)
    return mixture


def _open_megatron(
    files: MegatronConfig, request: TokensRequest, console: Console
) -> MegatronSource:
    """Open token files in the published order, which is computed once and cached."""
    tokenizer = _given_tokenizer(request)
    if tokenizer is None:
        raise UserError(
            "tokenizer.file is missing. data=megatron holds token ids, from which no tokenizer can "
            "be trained. Give tokenizer=file tokenizer.file=PATH, the tokenizer of the data."
        )
    with console.status("computing the order of the samples (once; it is cached)"):
        source = MegatronSource.open(
            files,
            tokenizer,
            samples=request.samples,
            context_length=request.context_length,
            seed=request.seed,
            cache=cache_dir(),
        )
        samples = len(source.sequences("train", request.context_length))
    epochs = f"{source.epochs} {'epoch' if source.epochs == 1 else 'epochs'}"
    console.print(
        f"data: {samples:,} samples of {request.context_length:,} tokens, {epochs} "
        f"of the training documents of {files.prefix}",
        highlight=False,
        soft_wrap=True,
    )
    return source


def _given_tokenizer(request: TokensRequest) -> Tokenizer | None:
    """Return the tokenizer of `tokenizer.file`, otherwise that of the source checkpoint."""
    config = resolve_tokenizer(request.origin.tokenizer, request.vocab_size)
    tokenizer = request.tokenizer
    if config.file is not None:
        tokenizer = Tokenizer.from_file(config.file, config.end_of_text)
    if tokenizer is not None:
        check_vocabulary(tokenizer.vocab_size, request.vocab_size)
    return tokenizer


def _trained_tokenizer(request: TokensRequest, corpus: Text, console: Console) -> Tokenizer:
    """Return a tokenizer trained on the corpus, from the cache if it is there."""
    config = resolve_tokenizer(request.origin.tokenizer, request.vocab_size)
    check_vocabulary(config.vocab_size, request.vocab_size)  # before minutes of training
    with console.status("training a tokenizer (once; it is cached)"):
        tokenizer = prepare_tokenizer(config, corpus, cache_dir())
    check_vocabulary(tokenizer.vocab_size, request.vocab_size)
    return tokenizer


def checkpoint_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Return the tokenizer of a checkpoint.

    Raises:
        UserError: the checkpoint was saved without one.
    """
    if checkpoint.tokenizer is None or checkpoint.end_of_text is None:
        raise UserError(
            f"{checkpoint.folder} holds no tokenizer. Add one: `tokengrow convert "
            f"source={checkpoint.folder} tokenizer.file=FILE to=tokengrow out=DIR`."
        )
    return Tokenizer.from_json(checkpoint.tokenizer, checkpoint.end_of_text)


def open_checkpoint_tokens(store: str | None, source: Checkpoint, console: Console) -> TokenSource:
    """Open a token store, or the tokens that a checkpoint was trained on.

    Args:
        store: directory of the store; None: the tokens that the run of `source` recorded.
        source: a checkpoint.
        console: receives progress and a summary.

    Raises:
        UserError: the tokens cannot be opened, or belong to another tokenizer.
    """
    tokens = open_store(Path(store)) if store else _open_recorded_tokens(source, console)
    place = f"store={store}" if store else "The recorded data of source"
    other_tokenizer = source.tokenizer not in (None, tokens.tokenizer().to_json())
    if other_tokenizer or tokens.vocab_size > source.config.vocab_size:
        raise UserError(
            f"{place} holds tokens of another tokenizer than that of source. Give a store= made "
            "with the tokenizer.json of source."
        )
    return tokens


def _open_recorded_tokens(source: Checkpoint, console: Console) -> TokenSource:
    """Open the data that the run of a checkpoint recorded, with the checkpoint's tokenizer."""
    run = source.run
    if run is None or run.tokens_from is None or run.batch_size is None:
        raise UserError("source has no recorded data, because no run wrote it. Give store=DIR.")
    origin = run.tokens_from
    request = TokensRequest(
        origin=TokensFrom(origin.data, {}, origin.store),
        vocab_size=source.config.vocab_size,
        tokenizer=None if origin.store else checkpoint_tokenizer(source),
        context_length=source.config.context_length,
        samples=run.batch_size,
        seed=run.seed,
    )
    try:
        return open_tokens(request, console)
    except UserError as error:
        raise UserError(
            f"The recorded data of source cannot be opened ({error}). Give store=DIR."
        ) from None


def resolve_text(section: Section, source: Checkpoint) -> Text:
    """Return the text of a `data` section; of `data=inherit`, that of the run of `source`.

    Args:
        section: the section.
        source: a checkpoint.

    Raises:
        UserError: the section names token ids or several texts, or the run recorded no data.
    """
    inherited = section["source"] is None
    section = text_section(section, source)
    if inherited and "store" in section:
        return _stored_text(section["store"])
    name = section["source"]
    place = f"data=inherit is data={name}, which" if inherited else f"data={name}"
    if name == MEGATRON:
        raise UserError(
            f"{place} holds token ids, but text is needed. Name the text that they were made of, "
            "for example data=text data.files=[FILE]."
        )
    if name == MIXTURE:
        raise UserError(f"{place} holds several texts. Give the data= of one of them.")
    return resolve_corpus(section)


def text_section(section: Section, source: Checkpoint) -> Section:
    """Return a `data` section; for `data=inherit`, the one that the run of `source` recorded.

    Raises:
        UserError: the run recorded no data.
    """
    if section["source"] is not None:
        return section
    recorded = source.run.tokens_from if source.run else None
    if recorded is None:
        raise UserError(
            "data=inherit needs recorded data, but no run wrote source. Name a text, for example "
            "data=text data.files=[FILE]."
        )
    return {"store": recorded.store} if recorded.store else recorded.data


def _stored_text(folder: str) -> StoredText:
    """Return the text of a store that a run was trained on."""
    store = open_store(Path(folder))
    if not isinstance(store, TokenStore):
        raise UserError(
            f"data=inherit is store={folder}, a mixture of several texts. Give the data= of one of "
            "them."
        )
    return StoredText(store)
