MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
CARGO := cargo
PYTHON := python3
NOT_OPTIMISED := --config profile.test.package.quell.opt-level=0
LESS_OPTIMISED := --config profile.test.package.quell.opt-level=1
# The model checkers' tests need features that exclude each other.
ALL := --locked --workspace --exclude interleavings

.PHONY: demo check test test-cuda test-cuda-all test-others models soak mutations stalls lint bench kernels kernels-check kernel-counts model clients references oracles

## Fetches a small model if it is missing, builds quell, and answers a question.
demo: model
	$(CARGO) build --release --locked -p quell
	./target/release/quell generate --model $(MODEL) --chat --max-tokens 96 --stats \
	    --prompt "Give me three tips for staying healthy."

## The fast loop: the unit tests of the bare engine. The crate itself is not optimised, so that
## it compiles faster.
check:
	$(CARGO) test --locked -p quell --no-default-features --lib $(NOT_OPTIMISED)

## Runs all tests: unit, integration, golden and documentation tests, the CUDA device on the
## virtual GPU, the server with third-party clients, the model checkers, the examples, and what
## is run on a machine with a GPU, on the virtual one. Also fails if the kernels do not do what
## benches/results/kernel-counts.json says.
##
## The tests of the CUDA device keep one core busy, because they share one virtual GPU, so the
## other tests run beside them, and after them what also needs the virtual GPU. The unit tests do
## not optimise the crate, which would take longer than running them: most of what is slow is in
## the integration tests, whose copy of the crate is optimised.
test: model clients references
	$(CARGO) build $(ALL) --profile test --examples
	$(CARGO) test $(ALL) --test '*' --bench kernels --no-run
	@# Cargo decides for itself how many jobs it runs.
	$(MAKE) --jobs 2 CARGO="env -u MAKEFLAGS $(CARGO)" test-cuda test-others

test-cuda:
	$(CARGO) test $(ALL) --test 'cuda*'
	$(CARGO) test $(ALL) --bench kernels -- --virtual --check
	$(PYTHON) scripts/gpu/pack --quick --pack target/gpu-virtual
	$(PYTHON) scripts/gpu/first-hour --virtual --small --pack target/gpu-virtual

## Runs what takes half an hour on the virtual GPU: every checkpoint in every way in which an
## answer can be computed, and all tests of the CUDA device with the images for compute
## capability 8.0.
test-cuda-all:
	QUELL_EVERY_CHECKPOINT=1 $(CARGO) test $(ALL) --test cuda every_checkpoint
	VGPU_COMPUTE_CAPABILITY=8.0 $(CARGO) test $(ALL) --test cuda

test-others:
	$(CARGO) test $(ALL) --test '[!c]*' --test 'cpu*'
	$(CARGO) test $(ALL) --doc
	$(MAKE) models
	$(CARGO) test $(ALL) --lib $(NOT_OPTIMISED)
	$(MAKE) check

## Runs the engine's threads under model checkers: loom explores every interleaving of a few
## threads, shuttle random interleavings of many. QUELL_SCHEDULES sets the number of the latter.
models:
	$(CARGO) test --locked -p interleavings --features loom --test loom $(LESS_OPTIMISED)
	$(CARGO) test --locked -p interleavings --features shuttle --test shuttle $(LESS_OPTIMISED)

## Runs a million requests and cancels most of them; accounting, memory and open files must
## return to their initial state. Then runs 100,000 schedules per scenario of the model checker.
soak:
	QUELL_SOAK_REQUESTS=1000000 $(CARGO) test --locked --release -p quell-tests --no-default-features --test soak -- --nocapture
	QUELL_SCHEDULES=100000 $(CARGO) test --locked -p interleavings --features shuttle --test shuttle

## Breaks the engine on purpose, in one way at a time: a test must fail each time. Takes half an
## hour on two cores, so `make test` does not include it.
mutations:
	$(PYTHON) scripts/mutations

## Runs the tests of the engine, the server and the program while random threads are stalled, to
## find what only works on a fast machine. QUELL_STALLS and QUELL_STALL_BITS set how often and
## how long threads are stalled.
STALLED := --locked --lib --test '[!cm]*' --test memory
stalls: model clients references
	$(CARGO) test $(STALLED) --no-run
	$(CARGO) build --locked --profile test --examples
	$(CC) -std=gnu11 -Wall -Werror -O2 -shared -fPIC -o target/stalls.so tests/stalls/stalls.c
	QUELL_SOAK_REQUESTS=2000 LD_PRELOAD=$(CURDIR)/target/stalls.so \
	    $(CARGO) test $(STALLED) --no-fail-fast

## Checks formatting, lints and documentation.
lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	@# Without the tests: their dependencies enable features that the product itself needs.
	$(CARGO) clippy --locked -p quell -- -D warnings
	$(CARGO) clippy --locked -p quell --no-default-features --lib -- -D warnings
	@# The tests of the bare engine, as `make check`, `make soak` and `make mutations` build them.
	$(CARGO) clippy --locked -p quell -p quell-tests --no-default-features --lib --tests -- -D warnings
	$(CARGO) clippy --locked -p interleavings --features loom --test loom -- -D warnings
	$(CARGO) clippy --locked -p interleavings --features shuttle --test shuttle -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked -p quell --no-deps

## Measures this machine: kernels, host code, then the whole engine, and counts the instructions
## per step. scripts/gpu/bench measures more of a GPU, and scripts/compare-llama-cpp compares
## with llama.cpp.
bench: model
	$(CARGO) bench --locked -p quell --features internals --bench cpu_linear
	$(CARGO) bench --locked -p quell --features internals --bench cpu_step
	$(CARGO) bench --locked -p quell --features internals --bench sampling
	$(CARGO) bench --locked -p quell --features internals --bench schedule
	$(CARGO) bench --locked -p quell --features internals --bench stream
	$(CARGO) bench --locked -p quell --features internals --bench cancel
	$(CARGO) bench --locked -p quell --features internals --bench prefix -- $(MODEL)
	$(CARGO) bench --locked -p quell --features internals --bench grammar
	$(CARGO) bench --locked -p quell --features internals --bench server
	$(CARGO) bench --locked -p quell --features internals --bench kernels
	$(CARGO) build --release --locked -p quell
	./target/release/quell bench --model $(MODEL) --mixed
	$(PYTHON) scripts/count-instructions

## Compiles the CUDA kernels to the portable images in kernels/ptx. Run it after changing
## kernels/.
kernels:
	$(PYTHON) scripts/compile-kernels

## Fails if the images are out of date, if a kernel wastes GPU resources, takes others than
## benches/results/kernel-resources.json says or more instructions than it should, or if its bits
## depend on the assembler.
kernels-check:
	$(PYTHON) scripts/compile-kernels --check
	$(PYTHON) scripts/check-resources --check
	$(PYTHON) scripts/count-gpu-instructions

## Writes the resources and the counts of the kernels, and the bounds that follow, to
## benches/results. Run it after `make kernels`.
kernel-counts:
	$(PYTHON) scripts/check-resources --write
	$(CARGO) test --locked --workspace --bench kernels -- --virtual --write

model:
	@$(PYTHON) scripts/fetch-model

## Installs the Python clients, the router and the browser that the server is tested with.
clients:
	@$(PYTHON) scripts/setup-clients
	@$(PYTHON) scripts/setup-browser

## Fetches vocabularies, chat templates and an embedding model, to compare with llama.cpp, jinja2 and
## sentence-transformers.
references:
	@$(PYTHON) scripts/fetch-references

## Compares the parsers of tool calls and reasoning with those of SMG and NVIDIA Dynamo, and records
## answers for the unit tests.
oracles:
	$(CARGO) run --locked --manifest-path tests/oracles/Cargo.toml -- --write
