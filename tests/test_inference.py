"""Tiles, tracks, a video's gate, threads that read ahead and write behind: each by itself, the answers known before."""

import threading
import time

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torchvision.ops import box_iou

from utils.config import UserError
from utils.inference import detections, overlap, tiles, tracks, weather_gate

# ---- tiles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(100, 640), (641, 640), (700, 1900), (2000, 3000)])
def test_tiles_cover_the_image_and_share_the_overlap(size):
    found = tiles.views(*size, 640, 128)
    covered = np.zeros(size, bool)
    for view in found:
        assert view.right - view.left == min(640, size[1]) and view.bottom - view.top == min(640, size[0])
        covered[view.top:view.bottom, view.left:view.right] = True
    assert bool(found) == (max(size) > 640) and (covered.all() or not found)
    columns = sorted({(view.left, view.right) for view in found})
    assert all(one[1] - other[0] >= 128 for one, other in zip(columns, columns[1:], strict=False))


def seen(view, objects, least, most=1e9):
    """What a perfect detector finds in a view: objects of which a third is visible, no smaller than `least` pixels."""
    box, labels, scores = torch.tensor(view, dtype=torch.float32), [], []
    boxes = []
    for number, (label, whole) in enumerate(objects):
        cut = torch.cat([torch.maximum(whole[:2], box[:2]), torch.minimum(whole[2:], box[2:])])
        visible = (cut[2:] - cut[:2]).clamp(min=0).prod() / (whole[2:] - whole[:2]).prod()
        if visible > 1 / 3 and least <= (whole[2:] - whole[:2]).max() <= most:
            boxes.append(cut)
            labels.append(label)
            scores.append(0.5 + 0.4 * visible.item() - 0.001 * number)
    return {"boxes": torch.stack(boxes) if boxes else torch.zeros(0, 4), "labels": torch.tensor(labels).long(),
            "scores": torch.tensor(scores)}


def scattered(seed, count=60, size=(1500, 2000)):
    """Objects of 20 to 900 pixels that do not touch each other's centre."""
    generator, found = np.random.default_rng(seed), []
    while len(found) < count:
        w, h = generator.uniform(20, 60, 2) if len(found) > 3 else generator.uniform(400, 900, 2)
        x, y = generator.uniform(0, size[1] - w), generator.uniform(0, size[0] - h)
        box = torch.tensor([x, y, x + w, y + h], dtype=torch.float32)
        label = int(generator.integers(2))
        if all(other != label or box_iou(box[None], one[None]) == 0 for other, one in found):
            found.append((label, box))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_every_object_is_there_once_whatever_cut_it(seed):
    objects = scattered(seed)
    whole = tiles.View(0, 0, 2000, 1500)
    parts = [(whole, seen(whole, objects, 100))] + [(view, seen(view, objects, 0)) for view in
                                                     tiles.views(1500, 2000, 640, 128)]
    assert sum(len(part["scores"]) for _, part in parts) > 1.4 * len(objects)
    one = tiles.merged(parts, 1500, 2000, 1000)
    iou = box_iou(one["boxes"], torch.stack([box for _, box in objects]))
    best, at = iou.max(1)
    assert len(one["scores"]) == len(objects) == len(set(at.tolist())) and best.min() > 0.95
    assert one["labels"].tolist() == [objects[i][0] for i in at.tolist()]
    assert (one["scores"].diff() <= 0).all()


def test_what_the_whole_image_missed_is_put_together_from_its_pieces():
    objects = [(0, torch.tensor([300.0, 200.0, 1100.0, 420.0]))]  # through three tiles
    whole = tiles.View(0, 0, 1400, 640)
    views = tiles.views(640, 1400, 640, 128)
    pieces = [(view, seen(view, objects, 0)) for view in views]
    assert sum(len(part["scores"]) for _, part in pieces) == 3
    one = tiles.merged([(whole, seen(whole, objects, 5000)), *pieces], 640, 1400, 100)
    assert one["boxes"].tolist() == [[300, 200, 1100, 420]]


def test_neighbours_and_other_classes_stay_apart():
    views = [tiles.View(0, 0, 640, 640), tiles.View(512, 0, 1152, 640)]

    def part(boxes, labels):
        return {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels),
                "scores": torch.linspace(0.9, 0.8, len(labels))}
    side_by_side = [(views[0], part([[500.0, 100, 560, 160]], [0])), (views[1], part([[562.0, 100, 620, 160]], [0]))]
    assert len(tiles.merged(side_by_side, 640, 1152, 100)["scores"]) == 2
    other_class = [(views[0], part([[540.0, 100, 600, 160]], [0])), (views[1], part([[540.0, 100, 600, 160]], [1]))]
    assert len(tiles.merged(other_class, 640, 1152, 100)["scores"]) == 2
    one_view = [(views[0], part([[10.0, 10, 60, 60], [22, 10, 72, 60], [11, 10, 60, 60]], [0, 0, 0])),
                (views[1], part([[700.0, 1, 720, 9]], [0]))]
    found = tiles.merged(one_view, 640, 1152, 100)["boxes"].tolist()  # two neighbours, one of them answered twice
    assert sorted(found) == [[10, 10, 60, 60], [22, 10, 72, 60], [700, 1, 720, 9]]


def test_no_detections_at_all_and_a_wrong_overlap():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0), "masks": []}
    one = tiles.merged([(tiles.View(0, 0, 9, 9), nothing), (tiles.View(0, 0, 4, 9), nothing)], 9, 9, 100)
    assert one["boxes"].shape == (0, 4) and one["masks"] == []
    for tile, share in ((640, 400), (-1, 0), (640, -1)):
        with pytest.raises(UserError, match="TILE"):
            tiles.require(tile, share)


def as_rle(pixels):
    code = rle.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def test_masks_of_pieces_are_joined_and_their_outline_is_a_polygon():
    whole = np.zeros((100, 200), bool)
    whole[20:80, 30:170] = True
    whole[20:50, 30:60] = False
    left, right = whole.copy(), whole.copy()
    left[:, 110:], right[:, :90] = False, False
    joined = tiles.joined([as_rle(left), as_rle(right)])
    assert (rle.decode(joined) == whole).all()
    polygons = detections.outlines(joined)
    drawn = rle.decode(rle.merge(rle.frPyObjects(polygons, 100, 200)))
    assert len(polygons) == 1 and (drawn & whole).sum() / (drawn | whole).sum() > 0.98
    assert detections.outlines(as_rle(np.zeros((9, 9)))) == []


# ---- tracks ------------------------------------------------------------------------------------------------------

def frame_of(boxes, scores=None, labels=None):
    n = len(boxes)
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(n, 4),
            "scores": torch.tensor([0.9] * n if scores is None else scores),
            "labels": torch.tensor([0] * n if labels is None else labels).long()}


def followed(frames, fps=12, threshold=0.5):
    """-> numbers of every frame."""
    tracker, found = tracks.Tracker(fps), []
    for frame in frames:
        if frame is None:
            tracker.pass_by()
            found.append(None)
        else:
            found.append(tracker.update(frame, frame["scores"] >= threshold).tolist())
    return found


def moving(t, speed=6, left=10, top=40):
    return [left + speed * t, top, left + speed * t + 40, top + 30]


def test_two_objects_that_pass_each_other_keep_their_numbers():
    frames = [frame_of([moving(t, 8, 10, 40), moving(t, -8, 250, 60)][::1 if t % 2 else -1]) for t in range(30)]
    found = followed(frames)
    first, second = ([row[0 if t % 2 else 1] for t, row in enumerate(found)],
                     [row[1 if t % 2 else 0] for t, row in enumerate(found)])
    assert found[0] == [0, 0]  # seen once: no number yet
    assert set(first[1:]) | set(second[1:]) == {1, 2} and len(set(first[1:])) == len(set(second[1:])) == 1


def test_a_weak_box_continues_a_track_and_begins_none():
    weak = {4, 5, 6}
    found = followed([frame_of([moving(t), [300, 5, 330, 30]], [0.2 if t in weak else 0.9, 0.2]) for t in range(12)])
    assert [row[0] for row in found] == [0] + [1] * 11 and {row[1] for row in found} == {0}


def test_a_hidden_object_comes_back_under_its_number_but_not_for_ever():
    hidden = [frame_of([moving(t)]) for t in range(5)] + [None, frame_of([]), None] + [
        frame_of([moving(t)]) for t in range(8, 11)]
    assert followed(hidden)[8:] == [[1]] * 3
    long = [frame_of([moving(0)])] * 3 + [frame_of([])] * 13 + [frame_of([moving(0)])] * 3  # more than a second
    assert followed(long)[-3:] == [[0], [2], [2]]


def test_another_class_in_the_same_place_is_another_object():
    found = followed([frame_of([[10, 10, 50, 50]], labels=[t // 3]) for t in range(6)])
    assert found == [[0], [1], [1], [0], [2], [2]]


# ---- the gate of a video -------------------------------------------------------------------------------------------

def weather(probabilities, frames=5, margin=0.4):
    return weather_gate.WeatherGate(0.5, frames, margin)(torch.tensor(probabilities)).tolist()


def switches(decisions):
    return sum(one != other for one, other in zip(decisions, decisions[1:], strict=False))


@pytest.mark.parametrize("seed", range(10))
def test_rain_that_begins_and_stops_is_two_switches(seed):
    """Noise of 1.5 on the logit, which rises and falls over a second: frame by frame the gate would flap."""
    generator = np.random.default_rng(seed)
    logit = np.interp(np.arange(240), [0, 80, 95, 160, 175, 240], [-3, -3, 3, 3, -3, -3])
    noise = generator.normal(0, 1.5, 240)
    noise[0] = 0  # the first frame decides alone
    noisy = (1 / (1 + np.exp(-(logit + noise)))).tolist()
    calm = weather(noisy)
    assert switches(weather(noisy, 1, 0.0)) > 4 and switches(calm) == 2
    begins, stops = calm.index(True), 240 - calm[::-1].index(True)
    assert 80 < begins < 110 and 160 < stops < 190


def test_the_gate_goes_by_its_two_thresholds_and_its_patience():
    assert weather([0.1] + [0.69] * 20) == [False] * 21                       # not sure enough
    assert weather([0.1] + [0.8] * 5) == [False] * 5 + [True]                 # the fifth in a row
    assert weather([0.1] + [0.8, 0.8, 0.8, 0.8, 0.6] * 4) == [False] * 21     # never five in a row
    assert weather([0.6, 0.4, 0.4]) == [True] * 3                             # the first one by the threshold alone
    gate = weather_gate.WeatherGate(0.5, 3, 0.4)                              # batches are one after the other
    assert [gate(torch.tensor(part)).tolist() for part in ([0.1, 0.9], [0.9, 0.9])] == [[False] * 2, [False, True]]
    assert weather_gate.WeatherGate(0.0, 1, 0.4)(torch.tensor([0.0, 0.0])).tolist() == [True, True]
    for frames, margin in ((0, 0.4), (1, 1.0), (1, -0.1)):
        with pytest.raises(UserError, match="RAIN_FRAMES"):
            weather_gate.require(frames, margin)


# ---- threads -------------------------------------------------------------------------------------------------------

def test_reading_ahead_keeps_the_order_and_reads_no_further_than_asked():
    taken = []
    reading = overlap.ahead((taken.append(i) or i for i in range(100)), 2)
    assert next(reading) == 0
    time.sleep(0.3)
    assert len(taken) <= 4
    assert list(reading) == list(range(1, 100))
    assert not any(thread.name == "reading" for thread in threading.enumerate())


def test_an_error_of_the_reader_comes_in_its_place_and_closing_ends_the_thread():
    def broken():
        yield 1
        raise UserError("broken")
    reading = overlap.ahead(broken())
    assert next(reading) == 1
    with pytest.raises(UserError, match="broken"):
        next(reading)
    endless = overlap.ahead(iter(int, 1))
    next(endless)
    endless.close()
    assert not any(thread.name == "reading" for thread in threading.enumerate())


def test_writing_behind_does_all_in_order_and_raises_what_failed():
    done = []
    with overlap.Behind(lambda i: (time.sleep(0.01), done.append(i)), 2) as behind:
        for i in range(10):
            behind.put(i)
    assert done == list(range(10))

    def fail(i):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space"), overlap.Behind(fail, 1) as behind:
        for i in range(10):
            behind.put(i)
    done.clear()
    with pytest.raises(KeyboardInterrupt), overlap.Behind(done.append, 4) as behind:
        behind.put(1)
        raise KeyboardInterrupt
    assert done == [1]  # what was put before Ctrl+C is there
