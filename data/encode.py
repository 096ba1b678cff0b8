"""Encodes texts by a tokenizer.json of Hugging Face's, in a process that its parent can end.

stdin: a line of JSON {"tokenizer": the file's content, "lengths": bytes of each text}, the texts.
stdout: a line of JSON, the number of tokens of each; all ids, uint32.
"""
import json
import resource
import sys
from array import array

from tokenizers import Tokenizer

BYTES = 2**31          # of address space, for the library and the vocabulary
BYTES_PER_BYTE = 1000  # of a text, for its tokens, their offsets and the like


def limit_memory(n_bytes):
    if sys.platform != "linux":  # others refuse it or take no notice
        return
    _, highest = resource.getrlimit(resource.RLIMIT_AS)
    if highest == resource.RLIM_INFINITY or n_bytes < highest:
        resource.setrlimit(resource.RLIMIT_AS, (n_bytes, highest))


def main():
    request = json.loads(sys.stdin.buffer.readline())
    lengths = request["lengths"]
    limit_memory(BYTES + BYTES_PER_BYTE * sum(lengths))
    tokenizer = Tokenizer.from_str(json.dumps(request["tokenizer"]))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as the text that they are
    documents = []
    for length in lengths:
        text = sys.stdin.buffer.read(length).decode()
        documents.append(array("I", tokenizer.encode(text, add_special_tokens=False).ids))
    print(json.dumps([len(ids) for ids in documents]), flush=True)
    for ids in documents:
        ids.tofile(sys.stdout.buffer)


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # whatever the library says: one line for the parent
        sys.exit(" ".join(str(error).split()))
