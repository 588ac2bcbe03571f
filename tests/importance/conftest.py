import pytest
import torch
from ranking_example import LENGTH, build_teacher, draw_batch, rank_stage


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from threads, and threads that wait for one another cost much."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["llama", "mistral"])
def family(request):
    return request.param


@pytest.fixture
def teacher(family):
    return build_teacher(family)


@pytest.fixture
def stage():
    return rank_stage()


@pytest.fixture
def batches(stage):
    # Another packing in each, so that masks must be made anew
    return [draw_batch(seed, lengths=(9 - seed % 3, 15 + seed % 3)) for seed in range(stage.steps)]


@pytest.fixture
def heldout():
    return [draw_batch(100), draw_batch(101, rows=1, lengths=(LENGTH,))]
