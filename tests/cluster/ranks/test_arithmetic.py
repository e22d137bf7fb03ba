"""What a device decides of a run's numbers: bf16 or float32, and that float32 is whole."""

import pytest
import torch

from clipreid.weights.initial import build_models
from cluster.ranks import arithmetic
from cluster.ranks.arithmetic import encoder_autocast, full_float32, has_bf16, settled
from cluster.ranks.team import Team
from cluster.settings.config import TrainSection
from cluster.settings.yaml_file import parse_config
from tests.helpers.devices import DEVICE, on_gpu
from tests.helpers.settings import model_spec
from tests.helpers.tolerances import within

CPU = torch.device("cpu")


def config(**train):
    return parse_config({"data": {"shards": "-"}, "train": train})


def test_auto_is_float32_and_not_compiled_on_a_cpu():
    train = settled(config(), Team()).train
    assert (train.precision, train.compile) == ("float32", False)
    with encoder_autocast(TrainSection(), CPU):
        assert not torch.is_autocast_enabled("cpu")


def test_auto_is_bf16_on_a_device_that_has_it(monkeypatch):
    monkeypatch.setattr(arithmetic, "has_bf16", lambda device: True)
    assert settled(config(), Team()).train.precision == "bf16"
    with encoder_autocast(TrainSection(), CPU):
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_auto_goes_on_in_what_was_begun_with_and_what_is_said_is_done(precision):
    assert settled(config(), Team(), precision).train.precision == precision
    said = settled(config(precision=precision, compile=True), Team(), "float32").train
    assert (said.precision, said.compile) == (precision, True)


def test_all_ranks_compute_in_the_same_precision(monkeypatch):
    """One has a GPU with bf16, the other has not."""

    class Unlike(Team):
        def all_gather_objects(self, value, operation):
            return [value, True]

    assert settled(config(), Unlike()).train.precision == "float32"


def test_float32_has_no_tf32_in_convolutions_nor_in_products():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    full_float32()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@on_gpu
@pytest.mark.parametrize("arch", ["tiny_vit", "tiny_rn"])
def test_an_encoder_on_the_gpu_gives_the_cpus_features(arch):
    full_float32()
    spec = model_spec(f"configs/models/{arch}.json", image_size=(64, 32))
    model = build_models(spec, None, seed=0).model.eval()
    images = torch.randn(16, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = torch.cat(model.double().features(images.double()), 1)
        model.float().to(DEVICE)
        for precision, tolerance in (("float32", 1e-4), ("bf16", 0.03)):
            with encoder_autocast(TrainSection(precision=precision), torch.device(DEVICE)):
                found = torch.cat(model.features(images.to(DEVICE)), 1).cpu().double()
            within((found - exact).norm() / exact.norm(), tolerance, precision)


@on_gpu
def test_a_gpu_from_ampere_on_has_bf16():
    device = torch.device(DEVICE)
    assert has_bf16(device) == (DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 0))
