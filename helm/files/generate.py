"""Generates a little text through the router's Service: what `helm test` runs."""

import json
import os
import ssl
import urllib.request

context = None
if os.environ.get("CERTIFICATE"):
    # Exactly the router's own certificate, whatever name it bears.
    context = ssl.create_default_context(cafile=os.environ["CERTIFICATE"])
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.check_hostname = False
headers = {"Authorization": f"Bearer {os.environ['TOKEN']}", "Content-Type": "application/json"}


def call(path, body=None):
    request = urllib.request.Request(os.environ["URL"] + path, body and json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60, context=context) as response:
        return json.load(response)


model = call("/v1/models")["data"][0]["id"]
answer = call("/v1/completions", {"model": model, "prompt": "The first thing", "max_tokens": 8, "temperature": 0})
text = answer["choices"][0]["text"]
assert answer["usage"]["completion_tokens"] > 0, answer
print(f"{model}: {text!r}")
