"""mambaflow: complete and enlarge images from a fifth of their pixels.

    from mambaflow import heun, load_model, uniform_times

    model, _ = load_model("runs/first-v2")                # the best checkpoint of a run
    velocity = model.condition(batch)                         # known pixels and places asked
    rgb = heun(velocity, noise, uniform_times(16))        # (b, n, 3) in [-1, 1]

The alphabet, the same in every room:

    b batch    k known pixels    n asked pixels    d width    s state    h heads
    t          time in [0, 1]: 0 is noise, 1 is data; x_t = (1 - t) x_0 + t x_1
    velocity   x_1 - x_0 in the mean, given x_t and the known pixels
    rgb        colours in [-1, 1]; images for people and metrics are in [0, 1] or bytes
    xy         pixel centres ((i + 1/2) / size) in [0, 1], x to the right, y down
"""

__version__ = "0.1.0"
