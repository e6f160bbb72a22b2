"""Stands for dlib where tests need likeness of the tiny model's images, which show no face.

Every image that is bright enough has one face, which fills it and looks into the camera. Its vector is the mean color,
followed by zeros.
"""

import numpy as np

DARK = 40
"""An image that is darker on average has no face."""


class point:  # noqa: N801
    def __init__(self, x: float, y: float):
        self.x, self.y = x, y


class rectangle:  # noqa: N801
    def __init__(self, left: int, top: int, right: int, bottom: int):
        self._edges = left, top, right, bottom

    def left(self) -> int:
        return self._edges[0]

    def top(self) -> int:
        return self._edges[1]

    def right(self) -> int:
        return self._edges[2]

    def bottom(self) -> int:
        return self._edges[3]


class points(list):  # noqa: N801
    pass


class full_object_detection:  # noqa: N801
    def __init__(self, box: rectangle, parts: points):
        self._parts = parts

    def parts(self) -> points:
        return self._parts


class shape_predictor:  # noqa: N801
    def __init__(self, file: str):
        pass

    def __call__(self, rgb: np.ndarray, box: rectangle) -> full_object_detection:
        width, height = box.right() - box.left(), box.bottom() - box.top()
        places = ((0.8, 0.4), (0.6, 0.4), (0.2, 0.4), (0.4, 0.4), (0.5, 0.6))
        return full_object_detection(box, points(point(box.left() + x * width, box.top() + y * height) for x, y in places))


class face_recognition_model_v1:  # noqa: N801
    def __init__(self, file: str):
        pass

    def compute_face_descriptor(self, rgb: np.ndarray, shape: full_object_detection) -> list[float]:
        return [*(rgb.mean(axis=(0, 1)) / 255).tolist(), *[0.0] * 125]


class _Detector:
    def run(self, rgb: np.ndarray, upsampled: int, least: float) -> tuple[list[rectangle], list[float], list[int]]:
        if rgb.mean() < DARK:
            return [], [], []
        return [rectangle(0, 0, rgb.shape[1] - 1, rgb.shape[0] - 1)], [1.0], [0]


def get_frontal_face_detector() -> _Detector:
    return _Detector()
