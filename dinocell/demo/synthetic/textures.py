"""Noise, textures and blur for synthetic fields."""

import functools

import cv2
import numpy as np

SHEET_PX = 512


@functools.cache
def sheets() -> dict[str, np.ndarray]:
    """Return the textures from which every cell is rendered: "grain" has mean 0 and std 1, others are in [0, 1]."""
    generator = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(SHEET_PX)[:, None], np.fft.rfftfreq(SHEET_PX)[None, :])

    def band(size: float) -> np.ndarray:
        spectrum = np.fft.rfft2(generator.normal(size=(SHEET_PX, SHEET_PX)))
        wave = np.fft.irfft2(spectrum * np.exp(-2 * (np.pi * size * frequency) ** 2) * (frequency > 1 / (size * 14)))
        return np.asarray((wave / wave.std()).astype(np.float32))

    def ridges(size: float, width: float) -> np.ndarray:
        return np.asarray(np.clip(1 - np.abs(band(size)) / width, 0, 1))

    return {
        "grain": 0.75 * band(1.3) + 0.65 * band(2.6),
        "filaments": np.maximum(ridges(2.6, 0.45), 0.8 * ridges(2.0, 0.35)),
        "fibres": ridges(2.2, 0.5) * np.clip(0.5 + 0.6 * band(9.0), 0, 1.5),
        "net": 0.5 * ridges(1.6, 0.6) + 0.5 * ridges(2.4, 0.8),
        "specks": np.clip((band(1.2) - 1.6) / 1.2, 0, 1.5),
    }


def smooth_noise(generator: np.random.Generator, size: tuple[int, int], scale: float) -> np.ndarray:
    """Draw noise with mean about 0 and std about 1 that varies over ``scale`` pixels."""
    coarse = generator.standard_normal((max(2, round(size[0] / scale) + 1), max(2, round(size[1] / scale) + 1)))
    smooth: np.ndarray = cv2.resize(coarse.astype(np.float32), size[::-1], interpolation=cv2.INTER_CUBIC)
    return smooth * np.float32(1.4)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """Apply a Gaussian blur; wide ones on a downscaled image, without a visible difference."""
    shrink = int(max(1, min(sigma // 2.5, min(image.shape) // 8)))
    if shrink == 1:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT))
    small = cv2.resize(image, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma / shrink, borderType=cv2.BORDER_REFLECT)
    return np.asarray(cv2.resize(small, image.shape[::-1], interpolation=cv2.INTER_LINEAR))
