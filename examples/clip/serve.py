"""CLIP or SigLIP as a service: embeddings and zero-shot classification, many requests in one forward, by Ray Serve.

    python examples/clip/serve.py --model examples/clip/demo_model
    curl -s localhost:8000/v1/embeddings -H 'Content-Type: application/json' -d '{"input": ["a red circle"]}'
    curl -s localhost:8000/v1/zero-shot-image-classification -d @- <<END
    {"inputs": "$(base64 -w0 examples/clip/shapes.png)",
     "parameters": {"candidate_labels": ["a red circle", "a blue cross"]}}
    END

POST /v1/embeddings takes what OpenAI's takes, and pictures: {"input": [{"image": "data:image/png;base64,..."}]}.
GET /health, /metrics (for Prometheus), /v1/models and /docs. An answer that is an error is {"error": {...}}: 400 for a
request that is wrong, 401 without the token, 413 for one that is too large, 429 when too many wait, 503 when the
service ends without a replica, 504 when one takes too long. There is a replica on each NPU, or GPU. Requests that were
taken are answered before the service ends.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from runners.startup import prepare

if __name__ == "__main__":
    prepare()
    from runners.clip.serving.run import main

    main(Path(__file__).name, __doc__)
