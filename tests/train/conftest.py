from __future__ import annotations

import numpy as np
import pytest

from cache.store import FeatureCache
from tests.conftest import MakeCache
from tests.train.runs import WORDS


@pytest.fixture
def cache(make_cache: MakeCache) -> FeatureCache:
    """30 photos with three captions each."""
    random = np.random.default_rng(0)
    captions = [
        [" ".join(random.choice(WORDS, random.integers(2, 9))) for _ in range(3)] for _ in range(30)
    ]
    return make_cache(captions)
