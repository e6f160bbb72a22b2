"""A custom node pack for ComfyUI: loaders, encoders and samplers that answer at once and note their use in MODEL_LOG.

With it the included workflows run on a CPU without any model, in the order in which ComfyUI would use the models.
"""

import os

import nodes
import torch
from comfy_api.latest import io

NODE_CLASS_MAPPINGS = {}
CLASSES = nodes.NODE_CLASS_MAPPINGS
LOG = open(os.environ["MODEL_LOG"], "a", buffering=1)  # noqa: SIM115 - as long as the server


def used(what, model):
    print(what, model, file=LOG)


def sample(self, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=1.0):
    used("sample", model)
    return (latent_image,)


def decode(self, vae, samples):
    used("decode", vae)
    return (torch.rand(1, 64, 64, 3),)


def encode_image(self, vae, pixels):
    used("encode image", vae)
    return ({"samples": torch.zeros(1, 4, 8, 8)},)


def encode_text(self, clip, text):
    used("encode", clip)
    return ([[torch.zeros(1, 2, 2), {"pooled_output": None}]],)


def encode_edit(cls, clip, prompt, vae=None, image1=None, image2=None, image3=None):
    used("encode", clip)
    return io.NodeOutput([[torch.zeros(1, 2, 2), {}]])


CLASSES["UNETLoader"].load_unet = lambda self, unet_name, weight_dtype: (unet_name,)
CLASSES["CLIPLoader"].load_clip = lambda self, clip_name, type="", device="default": (clip_name,)
CLASSES["VAELoader"].load_vae = lambda self, vae_name, **_: (vae_name,)
CLASSES["LoraLoaderModelOnly"].load_lora_model_only = lambda self, model, lora_name, strength_model: (model,)
CLASSES["KSampler"].sample = sample
CLASSES["VAEDecode"].decode = decode
CLASSES["VAEEncode"].encode = encode_image
CLASSES["CLIPTextEncode"].encode = encode_text
CLASSES["TextEncodeQwenImageEditPlus"].execute = classmethod(encode_edit)
shift = CLASSES["ModelSamplingAuraFlow"]
for name in ("patch", "patch_aura"):
    if hasattr(shift, name):
        setattr(shift, name, lambda self, model, shift: (model,))
if hasattr(shift, "execute"):
    shift.execute = classmethod(lambda cls, model, shift: io.NodeOutput(model))
