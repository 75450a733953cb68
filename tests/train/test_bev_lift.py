"""The lifter's task: scenes, heads, losses, and whole runs of seconds."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from saccade.train.data.bev_scenes import CAMERAS, MEAN, STD, BevScenes, augment, corners, motion_between
from saccade.train.data.loader import EvaluationOrder
from saccade.train.data.nuscenes import NuScenes, Samples, ego_motion, grid, split_scenes
from saccade.train.models.bev import CentreHead, DecoderHead, depth_loss
from saccade.train.runtime.checkpoint import read
from saccade.train.runtime.errors import UserError
from saccade.train.tasks.lift import Lift
from support.forked import forked
from support.levels import exhaustive
from support.runs import assert_same_end, finish, interrupt_and_resume, records, train

from .conftest import ROOT

SIZE = (32, 48)
MODEL = dict(name="dfa3d_bev_s", backbone="test_resnet", strides=(8, 16), depth_stride=8, embed_dims=16, heads=2)
MODEL |= dict(points=4, layers=1, ffn=32, bev_size=(16, 16), pc_range=(-16.0, -16.0, -2.3, 16.0, 16.0, 1.7))
MODEL |= dict(depth_bound=(1.0, 21.0, 2.0), depth_groups=(), can_bus=0, drop_rate=0.0)
INPUTS = dict(input_size=(3, *SIZE), mean=MEAN, std=STD)


def source(**kwargs) -> BevScenes:
    return BevScenes(**(dict(train=4, val=2, test=2, img_size=SIZE) | kwargs))


def settings(**kwargs) -> dict:
    return dict(
        model=dict(MODEL), data=dict(type=BevScenes, train=4, val=2, test=2, img_size=SIZE), task=dict(type=Lift),
        optimizer=dict(opt="adamw", lr=1e-3), schedule=dict(sched="cosine"), epochs=2, batch_size=2, log_every=1,
        device="cpu",
    ) | kwargs  # fmt: skip


def projected(matrix, points):
    u, v, d = matrix[:3, :3] @ points.T + matrix[:3, 3:]
    return np.stack([u / d, v / d, d], 1)


def in_box(points, box):
    """Coordinates of points from a box's centre, in halves of its size."""
    c, s = np.cos(box[6]), np.sin(box[6])
    return np.abs((points - box[:3]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])) / (box[3:6] / 2)


@pytest.mark.parametrize(("slope", "stands"), [(0.0, 0.0), (0.3, 1.0)])
def test_scenes_are_exact(slope, stands):
    """Pixels that a box covers have its depth, and are within what its corners span; all others have the ground's or a
    pedestal's."""
    world = source(slope=slope, stands=stands).world("train", 1)
    frame = world.frame(0.0, (64, 96))
    assert len(frame.boxes) >= 6 and set(frame.labels) <= set(range(4))
    pedestals, on_slope, on_pedestal = world.stand_boxes(frame.boxes), 0, 0
    assert len(pedestals) == (stands * (world.pace == 0)).sum()
    for n, camera in enumerate(CAMERAS):
        _, depth, hit = world.render(camera, frame.boxes, frame.pose, (64, 96))
        np.testing.assert_array_equal(depth, frame.depth[n])
        v, u = np.nonzero(depth)
        points = np.stack([(u + 0.5) * depth[v, u], (v + 0.5) * depth[v, u], depth[v, u], np.ones(len(u))], 1)
        points = points @ np.linalg.inv(frame.lidar2img[n]).T
        rest = points[hit[v, u] < 0]
        height = (rest @ frame.pose.T)[:, 2] - world.ground_height((rest @ frame.pose.T)[:, :2])
        away = np.min([np.abs(in_box(rest[:, :3], box).max(1) - 1) for box in pedestals] or [np.ones(len(rest))], 0)
        assert (np.minimum(np.abs(height), away) < 1e-3).all()
        on_slope += (np.abs(rest[:, 2] + frame.pose[2, 3]) > 0.1).sum()
        on_pedestal += (height > 0.01).sum()
        for i, box in enumerate(frame.boxes):
            own = in_box(points[hit[v, u] == i, :3], box)
            assert (own < 1 + 1e-3).all()  # within the box …
            np.testing.assert_allclose(own.max(1), 1, atol=1e-3) if len(own) else None  # … and on its surface
    assert frame.pixels.sum() > 100 and (on_slope > 0) == (slope > 0) and (on_pedestal > 0) == (stands > 0)
    at = (np.concatenate([frame.boxes[:, :3], np.ones((len(frame.boxes), 1))], 1) @ frame.pose.T)[:, :3]
    bottom = at[:, 2] - frame.boxes[:, 5] / 2 - world.ground_height(at[:, :2])
    np.testing.assert_allclose(bottom, world.stands, atol=1e-9)
    assert ((world.stands > 0) == (stands > 0) * (world.pace == 0)).all() and world.stands.max() <= 1.2


def test_scenes_repeat_and_differ():
    one, two = source().world("train", 0).frame(0.0, SIZE), source().world("train", 0).frame(0.0, SIZE)
    assert np.array_equal(one.images, two.images) and np.array_equal(one.boxes, two.boxes)
    other = source().world("val", 0).frame(0.0, SIZE)
    assert not np.array_equal(one.images, other.images)
    assert not np.array_equal(one.images, source(seed=1).world("train", 0).frame(0.0, SIZE).images)


def test_what_stands_still_stays_in_the_world():
    world = source(most=16).world("train", 2)
    first, later = world.frame(-0.5, SIZE), world.frame(0.0, SIZE)
    still = world.pace == 0
    assert still.any() and world.speed > 0.5

    def in_world(frame):
        return frame.boxes[still, :3] @ frame.pose[:3, :3].T + frame.pose[:3, 3]

    np.testing.assert_allclose(in_world(first), in_world(later), atol=1e-9)
    x, y, yaw = motion_between(first.pose, later.pose).tolist()
    assert yaw == pytest.approx(0.5 * np.rad2deg(world.turning), abs=1e-4)
    # Half a second along an arc: seen from the later view, mostly ahead (y).
    assert np.hypot(x, y) == pytest.approx(0.5 * world.speed, rel=0.01) and y > 0.9 * np.hypot(x, y)
    # What moves does so with its velocity: the places after the frames' motion is taken off.
    shift = later.boxes[:, :2] - 0.5 * later.boxes[:, 7:]
    before = first.boxes[:, :3] @ first.pose[:3, :3].T + first.pose[:3, 3]
    before = (before - later.pose[:3, 3]) @ later.pose[:3, :3]
    np.testing.assert_allclose(shift, before[:, :2], atol=1e-6)


def test_augmentation_keeps_the_geometry():
    """Turned, mirrored or both, the corners of every box are at the same pixels, or the mirrored ones."""
    data = source()
    plain = data.dataset("train", INPUTS)[0]
    kinds = set()
    for seed in range(6):
        torch.manual_seed(seed)
        sample = data.dataset("train", INPUTS)[0]
        frames = sample["frames"]
        boxes = augment(frames, sample["boxes"], turn=60.0, mirror=True, light=0.0)
        flipped = not torch.equal(frames[0]["depth"], plain["frames"][0]["depth"])
        kinds.add(flipped)
        for n in range(6):
            for old, new in zip(plain["boxes"], boxes):
                was = projected(plain["frames"][0]["lidar2img"][n].double().numpy(), corners(old.double().numpy()))
                now = projected(frames[0]["lidar2img"][n].double().numpy(), corners(new.double().numpy()))
                if was[:, 2].min() < 0.5:
                    continue
                was[:, 0] = SIZE[1] - was[:, 0] if flipped else was[:, 0]
                order = lambda points: points[np.lexsort(points.round(2).T)]  # noqa: E731
                np.testing.assert_allclose(order(now), order(was), atol=0.02)
        assert frames[0]["motion"].abs().max() < 1e-5 and (boxes[:, 3:6] == plain["boxes"][:, 3:6]).all()
    assert kinds == {False, True}


def truth():
    boxes = torch.tensor(
        [[3.2, -7.9, -0.9, 4.5, 1.9, 1.6, 0.7, 2.0, -1.0], [-10.4, 11.1, -1.0, 0.8, 0.7, 1.7, -2.9, 0.0, 0.0]]
    )
    return boxes, torch.tensor([0, 2])


def test_centre_head_returns_what_it_is_taught():
    """Peaks and codes written as the loss wants them give zero box loss, and the boxes back."""
    torch.manual_seed(0)
    head = CentreHead(8, 4, (32, 32), (-16, -16, -2, 16, 16, 2), most=5)
    boxes, labels = truth()
    at = head.place(boxes)
    torch.testing.assert_close(at, (boxes[:, :2] + 16))
    heat = head.heat(boxes, labels, (4, 32, 32))
    assert heat[0, 8, 19] == heat[2, 27, 5] == 1 and heat[1].max() == 0 and (heat == 1).sum() == 2
    logits = torch.logit(heat[None], 1e-4)
    codes = torch.zeros(1, 10, 32, 32)
    for box, (x, y) in zip(boxes, at):
        ray = torch.atan2(y.floor() - 15.5, x.floor() - 15.5)  # of the cell's middle, from the middle of the view
        turned = box[6] - ray
        rest = [x % 1, y % 1, box[2], *box[3:6].log(), turned.sin(), turned.cos(), *box[7:]]
        codes[0, :, int(y), int(x)] = torch.stack([torch.as_tensor(v) for v in rest])
    losses = head.loss((logits, codes), [boxes], [labels])
    assert losses["boxes"] < 1e-6 and losses["peaks"] < 0.2
    ((found, scores, kinds),) = head.boxes((logits, codes))
    best = scores > 0.9
    assert best.sum() == 2 and set(kinds[best].tolist()) == {0, 2}
    for box, label in zip(boxes, labels):
        torch.testing.assert_close(found[best][kinds[best] == label][0], box, atol=1e-5, rtol=1e-5)
    worse = head.loss((logits, codes + 0.1), [boxes], [labels])["boxes"]
    assert worse == pytest.approx(0.5 * 0.1 * (8 + 2 * 0.2), rel=1e-4)
    head = CentreHead(8, 4, (32, 32), (-16, -16, -2, 16, 16, 2), yaw_weight=4.0)
    worse = head.loss((logits, codes + 0.1), [boxes], [labels])["boxes"]
    assert worse == pytest.approx(0.5 * 0.1 * (6 + 2 * 4 + 2 * 0.2), rel=1e-4)


def test_decoder_matches_each_box_once():
    torch.manual_seed(0)
    head = DecoderHead(16, 4, (8, 8), (-16, -16, -2, 16, 16, 2), queries=7, layers=2, heads=2, hidden=32)
    boxes, labels = truth()
    wanted = head.encode(boxes)
    logits, codes = torch.full((7, 4), -4.0), torch.randn(7, 10)
    codes[5], codes[2] = wanted[0], wanted[1]
    logits[5, 0] = logits[2, 2] = 4.0
    rows, columns = head.match(logits, codes, wanted, labels)
    assert dict(zip(columns.tolist(), rows.tolist())) == {0: 5, 1: 2}
    ((found, _, kinds),) = head.boxes([(logits[None], codes[None])])
    assert kinds[:2].tolist() in ([0, 2], [2, 0])
    for box, label in zip(boxes, labels):
        torch.testing.assert_close(found[:2][kinds[:2] == label][0], box, atol=1e-5, rtol=1e-5)
    losses = head.loss([(logits[None], codes[None])] * 2, [boxes], [labels])
    assert losses["boxes"] == losses["boxes_0"] == 0
    p = torch.tensor([-4.0, 4.0]).sigmoid().double()
    focal = 26 * 0.75 * p[0] ** 2 * -(1 - p[0]).log() + 2 * 0.25 * (1 - p[1]) ** 2 * -p[1].log()
    assert losses["classes"].item() == pytest.approx(2 * focal.item() / 2, rel=1e-4)
    empty = head.loss([(logits[None], codes[None])], [boxes[:0]], [labels[:0]])
    assert empty["boxes"] == 0 and empty["classes"] > 0
    view = torch.randn(2, 16, 8, 8)
    outputs = head(view)
    assert len(outputs) == 2 and outputs[0][0].shape == (2, 7, 4) and outputs[1][1].shape == (2, 7, 10)
    for _, code in outputs:  # centres are within the range
        assert (code[..., :2].abs() <= 16).all() and (code[..., 4].abs() <= 2).all()


def test_depth_loss_is_over_cells_with_depth():
    codes = torch.tensor([0.2, 0.8, 0.5, 0.5]).view(1, 2, 2, 1, 1)
    target = torch.tensor([0.0, 1.0, 0.0, 0.0]).view(1, 2, 2, 1, 1)
    assert depth_loss(codes, target).item() == pytest.approx(-2 * np.log(0.8), rel=1e-5)
    assert depth_loss(codes, 0 * target) == 0


@pytest.mark.parametrize("head", ["centre", "decoder"])
def test_learns_one_scene(head):
    torch.manual_seed(0)
    arguments = dict(queries=20, layers=2, heads=2, hidden=32) if head == "decoder" else {}
    data = source(train=1, turn=0.0, mirror=False, light=0.0)
    job = Lift(data, head=head, head_args=arguments)
    net = job.model(**MODEL)
    dataset = data.dataset("train", INPUTS)
    batch = dataset.collate([dataset[0], dataset[0]])
    optimizer, losses = torch.optim.AdamW(net.parameters(), 3e-3), []
    for _ in range(25):
        loss, said = job.loss(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0] and {"boxes", "depth"} <= set(said)
    assert all(p.grad is not None for p in net.parameters())


def test_frames_before_are_seen_without_gradients():
    torch.manual_seed(0)
    data = source(frames=2)
    job = Lift(data)
    net = job.model(**MODEL)
    dataset = data.dataset("val", INPUTS)
    batch = dataset.collate([dataset[0], dataset[1]])
    assert len(batch["frames"]) == 2 and batch["frames"][0]["motion"].abs().max() < 1e-5
    net.train()
    net.lifter.depth.eval()  # as engine leaves what is frozen
    (peaks, _), _ = net(batch["frames"])
    assert not net.lifter.depth.training and net.lifter.encoder.training and net.lifter.backbone.training
    with torch.no_grad():
        net.eval()
        view = net.lifter(*[batch["frames"][0][name] for name in ("images", "lidar2img")])
        last = batch["frames"][1]
        want = net.head(net.lifter(last["images"], last["lidar2img"], view, last["motion"]))[0]
        torch.testing.assert_close(net(batch["frames"])[0][0], want)
        alone = net(batch["frames"][1:])[0][0]
    assert (want - alone).abs().max() > 1e-4 and peaks.requires_grad


def test_whole_run_and_its_export(tmp_path):
    folder = train(tmp_path / "run", settings())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    val = [line for line in lines if line["kind"] == "val"]
    assert len(val) == 2 and {"mAP", "NDS", "mAP_2m", "mATE"} <= set(val[0])
    assert (folder / "pictures" / "batch.png").exists()
    job = Lift(source())
    net = job.restore(folder, MODEL).eval()
    dataset = source().dataset("test", INPUTS)
    with torch.no_grad():
        metrics, detail = job.evaluate(net, [dataset.collate([dataset[0], dataset[1]])])
    assert metrics["images"] == 2 and 0 <= metrics["mAP"] <= 100
    frame, other = (dataset.collate([dataset[i]])["frames"][0] for i in (0, 1))
    program = torch.export.export(net, ([frame],)).module()
    with torch.no_grad():
        (peaks, codes), _ = net([other])
    (exported_peaks, exported_codes), _ = program([other])
    torch.testing.assert_close(exported_peaks, peaks, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exported_codes, codes, rtol=1e-4, atol=1e-4)
    beside, said = job.report(folder, detail)
    assert set(beside["classes"]) == set(job.class_names) and len(said) == 4
    assert (folder / "classes.csv").read_text().startswith("class,AP_0.5m,AP_1.0m,AP_2.0m,AP_4.0m,ATE")
    drawn = job.draw_results(folder, net, dataset, detail)
    assert [file.name for file in drawn] == ["sample_0.png", "sample_1.png"] and all(file.exists() for file in drawn)
    tensors, _ = read(folder / "checkpoints" / "best.safetensors")
    best = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    assert all(torch.equal(best[key], value) for key, value in net.state_dict().items())


def test_resumes_exactly(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", settings(epochs=2, eval_every=1))
    interrupt_and_resume(tmp_path / "parts", settings(epochs=2, eval_every=1, save_every=1), Lift, 3, monkeypatch)
    assert_same_end(whole, tmp_path / "parts")


@pytest.mark.parametrize(
    ("model", "task", "said"),
    [
        (dict(name="resnet18"), {}, "model.name=resnet18 is no lifter"),
        (dict(MODEL, depth_network=False), {}, "needs task.known_depth=True"),
        (MODEL, dict(known_depth=True), "needs model.depth_network=False"),
        (MODEL, dict(head_args=dict(most=5, mots=3)), "unknown key task.head_args.mots, did you mean most"),
        (dict(MODEL, bev_sise=3), {}, "dfa3d_bev_s has no argument model.bev_sise, did you mean bev_size"),
    ],
)
def test_mistakes_are_one_sentence(model, task, said):
    with pytest.raises(UserError, match=said):
        Lift(source(), **task).model(**model)


def test_earlier_frames():
    """In tests none, as the view is carried on; in training the last four without a random one, or those just before,
    fewer where a scene begins."""
    tables = SimpleNamespace(get=lambda table, token: dict(prev=str(int(token) - 1) if int(token) else ""))
    source = SimpleNamespace(tables=tables, frames=4)
    inputs = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    assert Samples(source, [], inputs, None).earlier("9") == []
    training = Samples(source, [], inputs, dict(skip=True, distort=False))
    drawn = [training.earlier("9") for _ in range(64)]
    assert {"".join(frames) for frames in drawn} == {"678", "578", "568", "567"}
    assert {"".join(training.earlier("2")) for _ in range(64)} == {"01", "0", "1"}
    adjacent = Samples(source, [], inputs, dict(skip=False, distort=False))
    assert adjacent.earlier("9") == ["6", "7", "8"] and adjacent.earlier("1") == ["0"]


def test_decoder_ignores_boxes_out_of_range():
    """A box beyond the view's range gives the loss of a sample without it."""
    head = DecoderHead(16, 2, (4, 4), (-8.0, -8.0, -2.0, 8.0, 8.0, 2.0), queries=5, layers=1, heads=2, hidden=8).eval()
    outputs = head(torch.randn(1, 16, 4, 4))
    boxes = torch.tensor([[1.0, 2, 0, 4, 2, 1, 0.3, 0, 0], [9.0, 2, 0, 4, 2, 1, 0.3, 0, 0]])
    both, one = (head.loss(outputs, [boxes[:n]], [torch.tensor([1, 0])[:n]]) for n in (2, 1))
    assert both.keys() == one.keys() and all(torch.equal(both[name], one[name]) for name in one)


def test_two_processes_measure_as_one(tmp_path):
    """Each sample counts once, also where the processes' shares are not equal."""
    data = dict(type=BevScenes, train=2, val=1, test=5, img_size=SIZE)
    folder = train(tmp_path / "run", settings(data=data, epochs=1))
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        assert forked(processes, "test", folder, "--out", out) == [0] * processes
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["images"] == 5 and set(metrics["classes"]) == {"car", "truck", "pedestrian", "barrier"}
        results.append([metrics[key] for key in ("mAP", "NDS", "mAP_4m", "mATE", "mASE", "mAOE")])
    # A batch of another size rounds otherwise.
    assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", exhaustive("fsdp")])
def test_two_processes_train(strategy, start, tmp_path):
    """In bf16, accumulated, over two frames, with BatchNorm over both; tested again, one process finds the same."""
    small = "frames=2 train=4 val=3 test=2 img_size=(32,48)"
    line = [f"data.{word}" for word in small.split()] + [f"model.{key}={value!r}" for key, value in MODEL.items()]
    line += ["model.backbone_args={}", "model.ffn=32", "precision=bf16", "accumulate=2", "batch_size=4", "sync_bn=True"]
    line += ["iterations=None"]
    line += [
        "epochs=2",
        "eval_every=2",
        "log_every=1",
        "schedule.warmup_epochs=0",
        "device=cpu",
        f"strategy={strategy}",
    ]
    file = ROOT / "configs/scenes/bev_dfa3d.py"
    finish(start(2, "--run-dir", tmp_path / "run", config=file, settings=line))
    steps, (there,) = records(tmp_path / "run", "train"), records(tmp_path / "run", "val")
    assert len(steps) == 2 and all(np.isfinite(s["loss"]) and {"peaks", "boxes", "depth"} <= set(s) for s in steps)
    assert forked(1, "test", tmp_path / "run", "--split", "val", "--out", tmp_path / "test") == [0]
    here = json.loads((tmp_path / "test/metrics.json").read_text())
    assert here["images"] == there["images"] == 3
    # bf16's rounding, the only difference, is magnified where boxes of equal score change places.
    for name in ("mAP", "mASE", "mATE"):
        assert here[name] == pytest.approx(there[name], abs=0.05), name


def test_numbers_of_the_ego(tmp_path):
    """Position, rotation, the first CAN bus message after the sample, yaw; differences to the frame before."""
    (tmp_path / "can_bus").mkdir()
    rows = [
        dict(utime=time, accel=[k, 2, 3], rotation_rate=[4, 5, 6], vel=[7, 8, k], pos=[0, 0, 0])
        for k, time in ((1, 10), (2, 20), (3, 30))
    ]
    (tmp_path / "can_bus" / "scene-7_pose.json").write_text(json.dumps(rows))
    turned = [np.cos(-np.pi / 3), 0, 0, np.sin(-np.pi / 3)]  # 120 degrees clockwise
    table = dict(
        a=dict(translation=[5.0, 6.0, 1.0], rotation=turned), b=dict(translation=[6.0, 3.0, 1.5], rotation=[1, 0, 0, 0])
    )
    tables = SimpleNamespace(
        get=lambda name, token: dict(
            sample_data=dict(ego_pose_token=token), ego_pose=table.get(token), scene=dict(name=token)
        )[name]
    )
    source = SimpleNamespace(root=str(tmp_path), tables=tables)
    source.messages = lambda scene: NuScenes._messages(source, scene)
    samples = {
        token: dict(data=dict(LIDAR_TOP=token), timestamp=time, scene_token="scene-7")
        for token, time in (("a", 20), ("b", 99))
    }
    first, second = (NuScenes.ego(source, samples[token]) for token in "ab")
    degrees = 240.0
    assert first == pytest.approx([5, 6, 1, *turned, 3, 2, 3, 4, 5, 6, 7, 8, 3, np.deg2rad(degrees), degrees])
    assert second[7:16].tolist() == [3, 2, 3, 4, 5, 6, 7, 8, 3]  # the last, where none comes after
    motion, bus = ego_motion(first, None)
    assert not motion.any() and bus[[0, 1, 2, 17]].tolist() == [0, 0, 0, 0] and bus[16] == pytest.approx(4 * np.pi / 3)
    motion, bus = ego_motion(second, first)
    # The ego looks along the world's x axis: right is -y, ahead is x.
    torch.testing.assert_close(motion, torch.tensor([3.0, 1.0, -240.0]), rtol=1e-5, atol=1e-5)
    assert bus[[0, 1, 2, 17]].tolist() == [1, -3, 0.5, -240]
    samples["a"]["scene_token"] = "scene-8"  # which has no messages
    assert not NuScenes.ego(source, samples["a"])[7:16].any()
    (tmp_path / "can_bus" / "scene-9_pose.json").write_text('[{"utime": 3}]')
    with pytest.raises(UserError, match=r"the CAN bus messages .*scene-9_pose.json can't be read \('accel'\)"):
        source.messages("scene-9")


def test_views_are_carried_through_a_scene():
    """Until the next scene begins, or a frame is missing."""
    torch.manual_seed(0)
    data = source(frames=2)
    task = Lift(data)
    net = task.model(**MODEL).eval()
    dataset = data.dataset("val", INPUTS)
    frames = [dataset.collate([dataset[i]])["frames"][1] for i in (0, 1)]
    order = [(0, True), (1, False), (2, False), (4, False), (5, True)]
    batches = [
        dict(
            frames=[frames[i % 2] | dict(scene_start=torch.tensor([start]))], boxes=[torch.zeros(0, 9)],
            labels=[torch.zeros(0).long()], index=torch.tensor([i]), streams=True,
        )
        for i, start in order
    ]  # fmt: skip
    views = []
    net.head.register_forward_pre_hook(lambda module, inputs: views.append(inputs[0]))
    with torch.no_grad():
        _, detail = task.evaluate(net, batches)
        assert list(detail["detections"]) == [0, 1, 2, 4, 5]
        zero, one = frames
        want = [net.look(zero, None)[0]]
        want += [net.look(one, want[0])[0]]
        want += [net.look(zero, want[1])[0], net.look(zero, None)[0], net.look(one, None)[0]]
    for got, expected in zip(views, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (want[2] - want[0]).abs().max() > 1e-3


def test_scenes_are_not_divided():
    tables = SimpleNamespace(get=lambda table, token: dict(scene_token=token[0]))
    sequences = split_scenes(tables, ["a1", "a2", "b1", "c1", "c2"])
    assert sequences == [[0, 1], [2], [3, 4]]
    assert list(EvaluationOrder(5, 2, sequences)) == [[(0, i)] for i in range(5)]


def test_grid_mask():
    """Squares of half the period, everywhere; the published sizes."""
    for seed in range(20):
        torch.manual_seed(seed)
        kept = grid(12, 30)
        assert kept.shape == (12, 30) and set(kept.flatten().tolist()) == {0.0, 1.0}
        torch.manual_seed(seed)
        period = int(torch.randint(2, 12, ()))
        side = min(max(int(period / 2 + 0.5), 1), period - 1)
        assert torch.equal(kept[:, period:], kept[:, :-period]) and torch.equal(kept[period:], kept[:-period])
        assert (1 - kept[:, :period]).sum(1).unique().tolist() in ([0, side], [side])
