"""`import clipreid`: the same features as extract.py, from whatever a program holds an image in."""

import io
import json
import subprocess
import sys

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

import clipreid
from clipreid.weights.file import ModelCard, save_model
from clipreid.weights.initial import build_models
from clipreid.weights.official import save_official
from cluster.library import pixels
from cluster.run.run_folder import STAGE1_RESULT
from cluster.settings.yaml_file import dump_config, load_config
from cluster.training.stage1_result import Stage1Result
from launch import extract
from shards.images.pictures import read_picture
from shards.loading.index import ShardIndex
from tests.helpers.golden_models import ROOT_CONFIGS
from tests.helpers.runs import ROOT, overrides
from tests.helpers.settings import model_spec
from tests.helpers.shards import picture
from tests.helpers.tolerances import close

CARD = ((0.5,) * 3, (0.5,) * 3, ("img", "proj"))


@pytest.fixture(scope="module")
def run(tiny_shards, tmp_path_factory):
    """A run folder as training leaves it, whose model knows cameras; and the images of its queries."""
    folder = tmp_path_factory.mktemp("library") / "run"
    folder.mkdir()
    (folder / "none.yaml").write_text("{}")
    config = load_config(folder / "none.yaml", overrides(tiny_shards, folder, model__sie="camera", eval__batch=32))
    (folder / "config.yaml").write_text(dump_config(config))
    index = ShardIndex.open(str(tiny_shards))
    train = index.split("train")
    spec = model_spec(
        str(ROOT_CONFIGS / "tiny_vit.json"),
        image_size=(32, 32),
        sie="camera",
        cameras=index.cameras,
        identities=train.num_identities,
        noun="vehicle",
    )
    models = build_models(spec, seed=3)
    torch.nn.init.normal_(models.model.cv_embed, std=0.5, generator=torch.Generator().manual_seed(0))
    save_model(folder / "model.safetensors", models, ModelCard(spec, *CARD))
    save_official(folder / "official.pth", models.state_dict(), spec)
    _write_texts(folder, models, train, index)
    return folder, models, tiny_shards.parent / "images" / "image_query"


def _write_texts(folder, models, train, index):
    from clipreid.stage1 import text_features
    from cluster.ranks.team import Team
    from cluster.run.storage import Storage

    texts = text_features(models.text.eval(), models.tables.tokens)
    result = Stage1Result(models.tables.tokens, texts, list(train.label_names), index.fingerprint, "")
    result.write(Storage(str(folder)), Team())


def extracted(*arguments, out):
    extract.main([*map(str, arguments), "--out", str(out)])
    with np.load(out) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def reid(run):
    return clipreid.load(run[0])


@pytest.fixture(scope="module")
def of_folder(run, tmp_path_factory):
    """What extract.py writes of the folder of queries."""
    return extracted("--weights", run[0], "--images", run[2], out=tmp_path_factory.mktemp("out") / "folder.npz")


@pytest.fixture(scope="module")
def decoded(run, tmp_path_factory):
    """Six images as arrays, uint8 [H, W, 3], and what extract.py writes of their files."""
    folder = tmp_path_factory.mktemp("decoded") / "photos"
    folder.mkdir()
    for seed in range(6):
        (folder / f"{seed}.jpg").write_bytes(picture(seed, width=41, height=70))
    arrays = [read_picture((folder / f"{seed}.jpg").read_bytes()).pixels for seed in range(6)]
    return arrays, extracted("--weights", run[0], "--images", folder, out=folder.parent / "photos.npz")["features"]


def test_a_folder_and_its_paths_are_encoded_as_extract_writes_them(run, reid, of_folder):
    paths = clipreid.list_images(run[2])
    assert [path.removeprefix(f"{run[2]}/") for path in paths] == of_folder["keys"].tolist()
    for images in (run[2], str(run[2]), paths, map(str, paths), [*map(run[2].joinpath, of_folder["keys"])]):
        found = reid.encode(images)
        assert found.dtype == np.float32 and np.array_equal(found, of_folder["features"])
    assert reid.width == found.shape[1] and np.array_equal(reid.encode(paths[3]), found[3:4])


def ways(arrays):
    """Images of one size by every way in which a program may hold them."""
    several = np.stack(arrays)
    tensor = torch.from_numpy(several)
    planes = tensor.permute(0, 3, 1, 2).contiguous()
    return {
        "pil": [Image.fromarray(array) for array in arrays],
        "array": several,
        "planar array": planes.numpy(),
        "tensor": tensor,
        "planar tensor": planes,
        "channels last": planes.to(memory_format=torch.channels_last),
        "list": list(arrays),
        "iterator of batches": iter(planes.split(3)),
        "mixed": [arrays[0], planes[1], *map(Image.fromarray, arrays[2:])],
        "fortran": np.asfortranarray(several),
    }


@pytest.mark.parametrize("way", ways([np.zeros((4, 5, 3), np.uint8)] * 4))
def test_pixels_are_encoded_as_extract_encodes_their_files(way, reid, decoded):
    arrays, features = decoded
    assert np.array_equal(reid.encode(ways(arrays)[way]), features)


def test_with_cameras_it_is_what_extract_writes_of_a_packed_split(run, reid, of_folder, tmp_path):
    split = extracted("--weights", run[0], "--split", "query", out=tmp_path / "query.npz")
    order = np.argsort(split["keys"])
    paths = [f"{run[2]}/{key.split('image_query_')[-1]}.jpg" for key in split["keys"]]
    for cameras in (split["cameras"], split["cameras"].tolist(), torch.from_numpy(split["cameras"])):
        assert np.array_equal(reid.encode(paths, cameras=cameras), split["features"])
    assert np.array_equal(reid.encode(paths, cameras=-1), of_folder["features"][order.argsort()])
    one = reid.encode(iter(paths), cameras=2)
    assert np.array_equal(one[split["cameras"] == 2], split["features"][split["cameras"] == 2])
    assert not np.array_equal(one, split["features"])


def test_threads_loaders_and_where_a_batch_ends_do_not_matter(run, of_folder):
    other = clipreid.load(run[0], "data.loaders=2")
    torch.set_num_threads(2)
    try:
        for size in (16, 17, 1000):
            assert np.array_equal(other.encode(run[2], batch_size=size), of_folder["features"])
    finally:
        torch.set_num_threads(1)


def test_settings_are_those_of_the_command_line(run, tmp_path):
    settings = ["eval.descriptor=[pre]", "eval.flip=true"]
    theirs = extracted("--weights", run[0], "--images", run[2], *settings, out=tmp_path / "pre.npz")["features"]
    reid = clipreid.load(run[0], *settings)
    assert reid.config.eval.descriptor == ("pre",) and reid.config.eval.flip
    assert np.array_equal(reid.encode(run[2]), theirs)


def test_an_iterator_is_read_as_it_is_needed(reid):
    taken = []

    def images():
        for number in range(200):
            taken.append(number)
            yield np.full((8, 8, 3), number, np.uint8)

    read = pixels.batches(images(), (32, 32), 16, 0)
    assert len(next(read).rows) == 16 and len(taken) == 16
    assert reid.encode(images()).shape == (200, reid.width)
    assert reid.encode(iter([])).shape == (0, reid.width)


def test_a_pil_image_is_the_picture_that_its_file_is():
    """Turned as its EXIF says, scaled from 16 bits, composed on white."""
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 2**16, (6, 9), dtype=np.uint16))
    clear = Image.fromarray(rng.integers(0, 256, (6, 9, 4), dtype=np.uint8))
    turned, exif = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)), Image.Exif()
    exif[0x0112] = 6
    for image, options in ((grey, {}), (clear, {}), (turned, {"exif": exif})):
        image.save(file := io.BytesIO(), "PNG", **options)
        theirs = read_picture(file.getvalue()).pixels
        opened = pixels.pixels_of(Image.open(io.BytesIO(file.getvalue())), 0)
        assert np.array_equal(opened.permute(1, 2, 0).numpy(), theirs)
    assert theirs.shape == (9, 6, 3)


def test_texts_are_those_of_stage_1_by_name_and_by_label(run, reid):
    result = Stage1Result.read(str(run[0] / STAGE1_RESULT))
    texts = result.text_features.block.detach()
    close(reid.describe(range(len(texts))), texts, rtol=1e-6, atol=1e-6)
    name = result.label_names[5]
    assert np.array_equal(reid.describe(name), reid.describe(5)) and reid.describe(name).shape == texts[5].shape
    with pytest.raises(ValueError, match=r"identity 'nobody': .* was trained on labels 0 ... 7$"):
        reid.describe("nobody")
    with pytest.raises(ValueError, match="identity 8: "):
        reid.describe([0, 8])


def test_the_card_and_the_settings_are_those_of_the_weights(run, reid):
    assert reid.card.spec.sie == "camera" and reid.card.descriptor == ("img", "proj")
    assert reid.config.model.image_size == (32, 32) and str(reid.device) == "cpu"


def test_a_file_an_authors_checkpoint_and_a_url_are_loaded(run, reid, of_folder):
    folder, _, images = run
    config = folder / "config.yaml"
    for weights in (folder / "model.safetensors", folder / "official.pth", f"file://{folder}"):
        given = {} if str(weights).startswith("file") else {"config": config}
        other = clipreid.load(weights, **given)
        assert np.array_equal(other.encode(images), of_folder["features"]), weights
        assert np.array_equal(other.describe([0, 3]), reid.describe([0, 3])), weights
    assert other.card and clipreid.load(folder / "official.pth", config=config).card is None
    with pytest.raises(ValueError, match=r"config: not given, and .*official.pth does not say .*: give config=FILE"):
        clipreid.load(folder / "official.pth")


def test_weights_are_loaded_from_a_url_that_fsspec_reads(run, of_folder):
    remote = fsspec.filesystem("memory")
    for name in ("model.safetensors", "config.yaml", STAGE1_RESULT):
        remote.pipe(f"/library/{name}", (run[0] / name).read_bytes())
    for url in ("memory://library", "memory://library/model.safetensors"):
        reid = clipreid.load(url)
        assert np.array_equal(reid.encode(run[2]), of_folder["features"])
        assert np.array_equal(reid.describe(0), clipreid.load(run[0]).describe(0))


GREY = np.zeros((8, 8), np.uint8)
REFUSED = {
    "float": (np.zeros((8, 8, 3), np.float32), r"image 0: ndarray float32 \(8, 8, 3\): give values 0 ... 255 as uint8"),
    "grey": (GREY, r"image 0: ndarray uint8 \(8, 8\) is neither \[H, W, 3\] nor \[3, H, W\]"),
    "either": (torch.zeros(3, 8, 3, dtype=torch.uint8), "has three values both first and last"),
    "second": ([np.zeros((8, 8, 3), np.uint8), GREY], "image 1: "),
    "number": (7, "images: int is none of path, PIL image"),
    "missing": ("nowhere/none.jpg", "nowhere/none.jpg: can't be read as an image"),
    "none": ([None], "images: NoneType is none of path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_image_is_refused_in_a_line(case, reid):
    images, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason) as caught:
        reid.encode(images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cameras", "reason"),
    [
        ([0, 1], "cameras: 2 for more images than that"),
        ([0, 1, 2, 3], "cameras: 4 for 3 images"),
        ([0.5, 1, 2], r"cameras: torch.float32 \(3,\); give one whole number"),
    ],
)
def test_cameras_are_one_an_image(cameras, reason, reid):
    with pytest.raises(ValueError, match=reason):
        reid.encode([np.zeros((8, 8, 3), np.uint8)] * 3, cameras)


def test_neither_ray_nor_deepspeed_is_imported(run):
    code = (
        "import clipreid, sys, numpy as np; light = [m for m in ('torch', 'cluster') if m in sys.modules]; "
        f"clipreid.load({str(run[0])!r}).encode(np.zeros((2, 8, 8, 3), np.uint8)); "
        "print(light, [m for m in ('ray', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[] []\n", done.stderr


def test_what_is_offered_is_named(run):
    assert {"load", "list_images", "ReID"} <= set(dir(clipreid))
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        clipreid.laod  # noqa: B018
    assert json.dumps(clipreid.load(run[0]).config.model_dump(mode="json"))


def test_weights_are_used_in_the_precision_that_they_were_trained_in(run, tmp_path):
    folder, models, _ = run
    spec = clipreid.load(folder).card.spec
    trained = {"settings": {"train": {"precision": "bf16"}}}
    for name in ("none.yaml", "config.yaml"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_model(tmp_path / "model.safetensors", models, ModelCard(spec, *CARD, training=trained))
    assert clipreid.load(tmp_path).config.train.precision == "bf16"
    assert clipreid.load(folder).config.train.precision == "float32"
