"""A stand-in ComfyUI: a real HTTP server that gives the answers recorded from ComfyUI, without torch or models.

It has two modes, for the two recorded versions: 0.33.0 (the default) and 0.3.64. `server.StandIn` starts one;
`python -m demo.standin_comfyui` starts one from the command line.
It executes small workflows with Pillow; samplers draw images instead of denoising latents.
"""
