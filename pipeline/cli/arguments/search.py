"""The settings of a search as they were typed."""

from __future__ import annotations

from pipeline.cli.errors import WrongArguments
from pipeline.cli.terminal import say
from train.config import SearchConfig, SearchError, check_search, with_enough_beams


def searched(search: SearchConfig) -> SearchConfig:
    """The settings with enough beams. Raises WrongArguments if they contradict each other."""
    search, notice = with_enough_beams(search)
    try:
        check_search(search)
    except SearchError as error:
        raise WrongArguments(str(error)) from None
    if notice is not None:
        say(notice)
    return search
