"""How does an ONNX model run on fastbn? With its BatchNormalization in place of that of the reference evaluator.

    python examples/onnx_reference.py

Needs onnx: pip install "fastbn[onnx]".
"""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx.reference

import fastbn.onnx

MODEL = """
<ir_version: 10, opset_import: ["": 15]>
net (float[N, 8, H, W] x, float[8] scale, float[8] b, float[8] mean, float[8] var) => (float[N, 8, H, W] y) {
    normalized = BatchNormalization (x, scale, b, mean, var)
    y = Relu (normalized)
}
"""


def main() -> None:
    """Runs the model on both, and holds them against float64."""
    rng = np.random.default_rng(0)
    mean = rng.uniform(1e4, 1e5, 8).astype(np.float32)
    inputs = {
        "x": rng.standard_normal((4, 8, 16, 16), np.float32) + mean[:, np.newaxis, np.newaxis],
        "scale": rng.standard_normal(8, np.float32),
        "b": rng.standard_normal(8, np.float32),
        "mean": mean,
        "var": rng.uniform(0.5, 2, 8).astype(np.float32),
    }
    model = onnx.parser.parse_model(MODEL)
    wide = {name: array.astype(np.float64) for name, array in inputs.items()}
    z = fastbn.infer(wide["x"], wide["scale"], wide["b"], wide["mean"], wide["var"], activation="relu")
    for name, operators in (("onnx's own", []), ("fastbn's", [fastbn.onnx.BatchNormalization])):
        evaluator = onnx.reference.ReferenceEvaluator(model, new_ops=operators)
        (y,) = evaluator.run(None, inputs)
        print(f"{name:<10} at most {abs(y - z).max():.1e} from float64")


if __name__ == "__main__":
    main()
