"""A stand-in ComfyUI: a real HTTP server that answers as ComfyUI 0.3.64 was recorded to answer, without torch or models.

`server.StandIn` starts one; `python -m demo.standin_comfyui` starts one from the command line.
It executes small workflows for real with Pillow; samplers draw images instead of denoising them.
"""
