cd /tmp/snd/tree && PYTHONPATH=/tmp/snd/tree:/tmp/snd/tree/transports /work/main/.venv/bin/python "$@"
