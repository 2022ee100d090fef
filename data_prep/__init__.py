"""Source files to array_record shards and a manifest; one script per dataset."""

import os

# Before numpy is loaded, here and in worker processes, which inherit it: with one thread each the eigenproblems of meshes
# are ten times as fast as with threads that wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
