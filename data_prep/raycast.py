"""Ray casting in numpy float32: affine primitives on the floor of a big box, one point light, hard shadows.

All surfaces are Lambertian, so a point has the same colour in every frame: what makes a rendered video a test of a
camera convention. Scene axes: z up, the ground at z = 0, the objects around the origin, lengths in scene units (the
objects together are about 2 across). Cameras follow OpenCV: x right, y down, z forward; pixel centres at half-integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.textures import Material, albedo

# Radius of the ball around each canonical shape: the unit ball, the cube [-1, 1]^3, the cylinder r <= 1, |z| <= 1.
BOUND = {"ellipsoid": 1.0, "box": 3.0**0.5, "cylinder": 2.0**0.5}


@dataclass(frozen=True)
class Camera:
    """World-to-camera rotation (OpenCV axes), centre (world units), focal lengths and principal point in pixels."""

    rotation_3x3: np.ndarray
    centre_3: np.ndarray
    focal_2: np.ndarray
    principal_2: np.ndarray
    height: int
    width: int


@dataclass(frozen=True)
class Primitive:
    """A canonical shape under x -> linear @ x + centre."""

    kind: str
    linear_3x3: np.ndarray
    centre_3: np.ndarray
    material: Material


@dataclass(frozen=True)
class Scene:
    """Primitives in a room |x|, |y| <= half, 0 <= z <= height, lit by a point light inside the room."""

    primitives: tuple[Primitive, ...]
    half: float
    height: float
    ground: Material
    wall: Material
    light_3: np.ndarray
    light_colour_3: np.ndarray
    ambient_colour_3: np.ndarray


def render(scene: Scene, camera: Camera, antialias: int = 1) -> np.ndarray:
    """The frame, uint8 sRGB image_HxWx3, averaged over antialias x antialias rays a pixel."""
    direction_3xP = rays(camera, antialias)
    reach_P, surface_P = trace(scene, camera.centre_3, direction_3xP)
    spacing = 1 / (antialias * float(camera.focal_2.mean()))
    radiance_3xP = shade(scene, camera.centre_3, direction_3xP, reach_P, surface_P, spacing)
    tiles = radiance_3xP.reshape(3, camera.height, antialias, camera.width, antialias)
    linear_HxWx3 = tiles.mean((2, 4)).transpose(1, 2, 0)
    return np.rint(255 * np.clip(linear_HxWx3, 0, 1) ** (1 / 2.2)).astype(np.uint8)


def depth(scene: Scene, camera: Camera) -> np.ndarray:
    """Distance along the optical axis of the surface behind each pixel centre, float32 depth_HxW, scene units."""
    return trace(scene, camera.centre_3, rays(camera, 1))[0].reshape(camera.height, camera.width)


def rays(camera: Camera, antialias: int) -> np.ndarray:
    """Directions direction_3xP in the world with unit z in the camera, so a ray parameter is a depth; row-major."""
    u_W = (np.arange(camera.width * antialias) + 0.5) / antialias
    v_H = (np.arange(camera.height * antialias) + 0.5) / antialias
    x_W = ((u_W - camera.principal_2[0]) / camera.focal_2[0]).astype(np.float32)
    y_H = ((v_H - camera.principal_2[1]) / camera.focal_2[1]).astype(np.float32)
    x_HxW, y_HxW = np.meshgrid(x_W, y_H)
    local_3xP = np.stack([x_HxW.ravel(), y_HxW.ravel(), np.ones(x_HxW.size, np.float32)])
    return camera.rotation_3x3.T.astype(np.float32) @ local_3xP


def trace(scene: Scene, origin_3: np.ndarray, direction_3xP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First hits of rays from one origin inside the room: ray parameter reach_P, surface_P.

    Surface i >= 0 is primitive i; -1, -2, -3 is the room's face across x, y, z that the ray leaves by.
    """
    origin_3 = origin_3.astype(np.float32)
    low_3 = np.array([-scene.half, -scene.half, 0], np.float32)
    high_3 = np.array([scene.half, scene.half, scene.height], np.float32)
    bound_3xP = np.where(direction_3xP > 0, (high_3 - origin_3)[:, None], (low_3 - origin_3)[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        # A ray that is exactly parallel to a face never leaves by it.
        exit_3xP = np.where(direction_3xP == 0, np.float32(np.inf), bound_3xP / direction_3xP)
    surface_P = -1 - np.argmin(exit_3xP, 0)
    reach_P = np.min(exit_3xP, 0)
    for index, primitive in enumerate(scene.primitives):
        near_Q = candidates(primitive, origin_3, direction_3xP)
        hit_Q = entry(primitive, origin_3, direction_3xP[:, near_Q])
        closer_Q = hit_Q < reach_P[near_Q]
        reach_P[near_Q[closer_Q]] = hit_Q[closer_Q]
        surface_P[near_Q[closer_Q]] = index
    return reach_P, surface_P


def candidates(primitive: Primitive, origin_3: np.ndarray, direction_3xP: np.ndarray) -> np.ndarray:
    """Indices of the rays whose line meets the ball around the primitive: the others need no exact test."""
    radius = BOUND[primitive.kind] * np.linalg.norm(primitive.linear_3x3, 2)
    offset_3 = (primitive.centre_3 - origin_3).astype(np.float32)
    along_P = offset_3 @ direction_3xP
    outside = np.float32(offset_3 @ offset_3 - radius**2)
    square_P = np.einsum("cp,cp->p", direction_3xP, direction_3xP)
    return np.flatnonzero((along_P > 0) & (along_P * along_P > outside * square_P))


def entry(primitive: Primitive, origin_3: np.ndarray, direction_3xP: np.ndarray) -> np.ndarray:
    """Ray parameter at which each ray enters the primitive, inf for a miss; the origin must lie outside."""
    inverse_3x3 = np.linalg.inv(primitive.linear_3x3)
    o_3 = (inverse_3x3 @ (origin_3 - primitive.centre_3)).astype(np.float32)
    d_3xP = inverse_3x3.astype(np.float32) @ direction_3xP
    with np.errstate(divide="ignore", invalid="ignore"):
        if primitive.kind == "ellipsoid":
            near_P, far_P = _round_interval(o_3, d_3xP)
        elif primitive.kind == "box":
            near_P, far_P = _slab_interval(o_3, d_3xP)
        else:
            side, caps = _round_interval(o_3[:2], d_3xP[:2]), _slab_interval(o_3[2:], d_3xP[2:])
            near_P, far_P = np.maximum(side[0], caps[0]), np.minimum(side[1], caps[1])
        return np.where((near_P < far_P) & (near_P > 0), near_P, np.float32(np.inf))


def _round_interval(o_A: np.ndarray, d_AxP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parameters between which o + t d is inside the unit ball or disc; nan for a miss."""
    a_P = np.einsum("ap,ap->p", d_AxP, d_AxP)
    b_P = o_A @ d_AxP
    root_P = np.sqrt(b_P * b_P - a_P * (o_A @ o_A - np.float32(1)))
    return (-b_P - root_P) / a_P, (-b_P + root_P) / a_P


def _slab_interval(o_A: np.ndarray, d_AxP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parameters between which every coordinate of o + t d is within [-1, 1]."""
    one_AxP = (-1 - o_A[:, None]) / d_AxP
    two_AxP = (1 - o_A[:, None]) / d_AxP
    return np.minimum(one_AxP, two_AxP).max(0), np.maximum(one_AxP, two_AxP).min(0)


def normal(primitive: Primitive, point_3xP: np.ndarray) -> np.ndarray:
    """Outward unit normals normal_3xP at world points on the primitive's surface."""
    inverse_3x3 = np.linalg.inv(primitive.linear_3x3)
    p_3xP = inverse_3x3.astype(np.float32) @ (point_3xP - primitive.centre_3.astype(np.float32)[:, None])
    if primitive.kind == "box":
        axis_P = np.abs(p_3xP).argmax(0)
        p_3xP = np.where(np.arange(3)[:, None] == axis_P, np.sign(p_3xP), np.float32(0))
    elif primitive.kind == "cylinder":
        cap_P = np.abs(p_3xP[2]) > np.hypot(p_3xP[0], p_3xP[1])
        p_3xP = np.stack([p_3xP[0] * ~cap_P, p_3xP[1] * ~cap_P, np.sign(p_3xP[2]) * cap_P])
    outward_3xP = inverse_3x3.T.astype(np.float32) @ p_3xP
    return outward_3xP / np.sqrt(np.einsum("cp,cp->p", outward_3xP, outward_3xP))


def shade(
    scene: Scene,
    origin_3: np.ndarray,
    direction_3xP: np.ndarray,
    reach_P: np.ndarray,
    surface_P: np.ndarray,
    spacing: float,
) -> np.ndarray:
    """Linear radiance radiance_3xP of the hits; spacing: distance between neighbouring rays at unit depth."""
    origin_3 = origin_3.astype(np.float32)
    point_3xP = origin_3[:, None] + reach_P * direction_3xP
    normal_3xP = np.zeros_like(point_3xP)
    for face in range(3):
        normal_3xP[face, surface_P == -1 - face] = 1
    normal_3xP *= -np.sign(np.einsum("cp,cp->p", normal_3xP, direction_3xP))
    for index, primitive in enumerate(scene.primitives):
        hit_Q = np.flatnonzero(surface_P == index)
        normal_3xP[:, hit_Q] = normal(primitive, point_3xP[:, hit_Q])
    length_P = np.sqrt(np.einsum("cp,cp->p", direction_3xP, direction_3xP))
    slant_P = -np.einsum("cp,cp->p", normal_3xP, direction_3xP) / length_P
    # A pixel covers spacing x spacing / slant of a slanted surface; the square root between is neither noisy nor dull.
    footprint_P = spacing * reach_P / np.sqrt(np.clip(slant_P, 0.1, 1))
    reflectance_3xP = np.empty_like(point_3xP)
    floor_P = (surface_P == -3) & (direction_3xP[2] < 0)
    parts = [(scene.ground, floor_P), (scene.wall, (surface_P < 0) & ~floor_P)]
    parts += [(primitive.material, surface_P == index) for index, primitive in enumerate(scene.primitives)]
    for material, part_P in parts:
        hit_Q = np.flatnonzero(part_P)
        reflectance_3xP[:, hit_Q] = albedo(material, point_3xP[:, hit_Q], footprint_P[hit_Q])
    return reflectance_3xP * irradiance(scene, point_3xP, normal_3xP)


def irradiance(scene: Scene, point_3xP: np.ndarray, normal_3xP: np.ndarray) -> np.ndarray:
    """Light arriving at surface points, irradiance_3xP: a sky-like ambient part plus the lamp unless it is hidden."""
    beam_3xP = point_3xP - scene.light_3.astype(np.float32)[:, None]
    length_P = np.sqrt(np.einsum("cp,cp->p", beam_3xP, beam_3xP))
    cosine_P = np.maximum(-np.einsum("cp,cp->p", normal_3xP, beam_3xP) / length_P, 0)
    lit_P = cosine_P * ~shadowed(scene, beam_3xP)
    lit_P *= np.float32(scene.light_3 @ scene.light_3) ** 0.5 / length_P  # gentler than 1/r^2: the walls stay visible
    ambient_P = 0.75 + 0.25 * normal_3xP[2]
    return scene.ambient_colour_3.astype(np.float32)[:, None] * ambient_P + scene.light_colour_3.astype(np.float32)[:, None] * lit_P


def shadowed(scene: Scene, beam_3xP: np.ndarray) -> np.ndarray:
    """Which points light + beam a primitive hides from the light, bool shadowed_P."""
    hidden_P = np.zeros(beam_3xP.shape[1], bool)
    for primitive in scene.primitives:
        near_Q = candidates(primitive, scene.light_3, beam_3xP)
        hidden_P[near_Q] |= entry(primitive, scene.light_3, beam_3xP[:, near_Q]) < 0.998
    return hidden_P
