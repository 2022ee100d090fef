"""What a record of every kind of dataset holds."""

from niso.data.example import Field, Schema

# One frame of a posed video: OpenCV camera-to-world (world units arbitrary per sequence), intrinsics in pixels of the
# stored square image.
FRAME: Schema = {
    "image_jpeg": Field("bytes", None),
    "camera_to_world_4x4": Field("float64", (4, 4)),
    "intrinsics_3x3": Field("float64", (3, 3)),
    "frame_number": Field("int64", ()),
}
SIGNATURE = 16  # channels of a surface: times of the heat-kernel signature


def still(size: int, channels: int = 3, labelled: bool = False) -> Schema:
    """One image of that edge: raw, since at the 16 pixels that are usual a JPEG would be larger, and is lossy."""
    image = {"image_HxWxC": Field("uint8", (size, size, channels))}
    return image | {"label": Field("int64", ())} if labelled else image


def surface(size: int) -> Schema:
    """One closed mesh of genus 0 and its conformal map to the sphere (data_prep/shapes.py).

    `signal_HxWxC` is the signature on the sphere's grid of `size` x 2 `size` points (niso/geometry/sphere.py): low_C + step_C
    times the stored number. mean_C and square_C are its moments by the sphere's area. The mesh itself, its axes run together:
    vertices on the unit sphere, faces, the signature of every vertex; 4 x 4 Möbius maps that came with it, where any did
    (niso/geometry/moebius.py); class, name and the quality of the map.
    """
    return {
        "signal_HxWxC": Field("uint16", (size, 2 * size, SIGNATURE)),
        "low_C": Field("float32", (SIGNATURE,)),
        "step_C": Field("float32", (SIGNATURE,)),
        "label": Field("int64", ()),
        "mean_C": Field("float64", (SIGNATURE,)),
        "square_C": Field("float64", (SIGNATURE,)),
        "sphere_Vx3": Field("float32", None),
        "face_Fx3": Field("int32", None),
        "hks_VxC": Field("float32", None),
        "map_KxXxY": Field("float32", None),
        "class": Field("bytes", None),
        "name": Field("bytes", None),
        "flipped": Field("float64", ()),
        "distortion": Field("float64", ()),
        "lost": Field("float64", ()),
    }
