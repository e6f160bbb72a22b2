"""A stand-in ComfyUI: a real HTTP server that gives the answers recorded from ComfyUI 0.3.64, without torch or models.

`server.StandIn` starts one; `python -m demo.standin_comfyui` starts one from the command line.
It executes small workflows with Pillow; samplers draw images instead of denoising latents.
"""
