"""Formats of images: those that are read and those that are not, by the suffix and by the first bytes of a file.

Standard library only.
"""

IMAGE_FORMATS = {
    "png": (".png", ".apng"),
    "jpeg": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"),
    "webp": (".webp",),
    "bmp": (".bmp", ".dib"),
    "tiff": (".tif", ".tiff"),
    "heic": (".heic", ".heif", ".hif"),
    "avif": (".avif",),
}
"""Formats of images in a data set -> the suffixes of their files, the usual one first. The content decides which format a file
has; its suffix, in any case, only that it is an image."""
IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)
FORMAT_NAMES = "PNG, JPEG, WebP, BMP, TIFF, HEIC or AVIF"
_OTHER_SUFFIXES = {
    "a GIF": ".gif",
    "a JPEG XL image": ".jxl",
    "a JPEG 2000 image": ".jp2 .j2k .jpx .jpf",
    "an SVG drawing": ".svg .svgz",
    "a vector drawing or document": ".eps .ai .pdf",
    "a Photoshop document": ".psd .psb",
    "a document of an image editor": ".xcf .kra .clip .procreate .afphoto",
    "a camera's raw file": ".dng .raw .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .raf .orf .rw2 .pef .srw .x3f .3fr .iiq .erf .mrw",
    "an image of another format": ".exr .hdr .tga .ico .icns .pcx .ppm .pgm .pbm .pnm .qoi .dds .jxr",
    "a video": ".mp4 .m4v .mov .webm .mkv .avi .wmv .mpg .mpeg .3gp .mts",
}
UNREAD_SUFFIXES = {suffix: what for what, suffixes in _OTHER_SUFFIXES.items() for suffix in suffixes.split()}
"""Suffixes of images and videos that are not read -> what such a file is."""
HEAD_BYTES = 64
"""How much of a file says which format it has."""
_MAGIC_BYTES = {
    "png": (b"\x89PNG\r\n\x1a\n",),
    "jpeg": (b"\xff\xd8\xff",),
    "bmp": (b"BM",),
    "tiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}
_BRANDS = {"avif": (b"avif", b"avis"), "heic": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")}
_CONTAINER_BRANDS = (b"mif1", b"msf1", b"mif2", b"miaf")
"""Of ISO 23008-12: the brands after them tell which codec it is."""
_OTHER_MAGIC_BYTES = {
    b"GIF8": "a GIF",
    b"8BPS": "a Photoshop document",
    b"\xff\x0a": "a JPEG XL image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 image",
    b"<svg": "an SVG drawing",
    b"<?xml": "an SVG drawing or another XML file",
    b"%PDF": "a PDF document",
    b"\x1aE\xdf\xa3": "a video",
}


def sniff_image_format(head: bytes) -> str | None:
    """The format (a key of IMAGE_FORMATS) of a file that begins with `head`, its first HEAD_BYTES bytes; None if unknown."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        end = min(int.from_bytes(head[:4], "big"), len(head))
        brands = [head[8:12], *(head[start : start + 4] for start in range(16, end, 4))]
        if brands[0] in _CONTAINER_BRANDS:
            return next((name for brand in brands for name, codes in _BRANDS.items() if brand in codes), "heic")
        return next((name for name, codes in _BRANDS.items() if brands[0] in codes), None)
    return next((name for name, magic in _MAGIC_BYTES.items() if head.startswith(magic)), None)


def describe_other_content(head: bytes) -> str | None:
    """What a file that begins with `head` is, if it is an image or video of a format that is not read."""
    if head[4:8] == b"ftyp":
        return "a video"
    return next((what for magic, what in _OTHER_MAGIC_BYTES.items() if head.startswith(magic)), None)
