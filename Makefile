MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
CARGO := cargo
PYTHON := python3

.PHONY: demo check test models soak mutations stalls lint bench kernels kernels-check model clients templates

## Fetches a small model if it is missing, builds, and answers a question.
demo: model
	$(CARGO) build --release --locked
	./target/release/quell generate --model $(MODEL) --chat --max-tokens 96 --stats \
	    --prompt "Give me three tips for staying healthy."

## The fast loop: the unit tests of the bare engine. The crate itself is not optimised, so
## that it compiles sooner; its dependencies are.
check:
	$(CARGO) test --locked --no-default-features --lib --config profile.test.package.quell.opt-level=0

## Runs everything: unit, integration, golden and documentation tests, the CUDA device on
## the virtual GPU, the server with clients that others have written, the model checkers,
## the examples and the documentation's.
test: model clients templates models
	$(CARGO) test --locked --workspace --features quell/otel
	$(CARGO) test --locked --no-default-features --lib

## The engine's threads under model checkers: loom in every interleaving of a few threads,
## shuttle in random ones of many; QUELL_SCHEDULES says how many.
models:
	$(CARGO) test --locked -p interleavings --features loom --test loom
	$(CARGO) test --locked -p interleavings --features shuttle --test shuttle

## A million requests, half of them cancelled: books, memory and files as before. Then
## 100,000 schedules of each scenario of the model checker.
soak:
	QUELL_SOAK_REQUESTS=1000000 $(CARGO) test --locked --release --test soak -- --nocapture
	QUELL_SCHEDULES=100000 $(CARGO) test --locked -p interleavings --features shuttle --test shuttle

## Breaks the engine on purpose, one way at a time: a test must fail each time. Five minutes
## on two cores once its dependencies are built, so it is no part of `make test`.
mutations:
	$(PYTHON) scripts/mutations

## Runs the tests of the engine, the server and the program while every thread is stalled at
## random: what holds only where the machine is quick fails. QUELL_STALLS and
## QUELL_STALL_BITS say how often and how long.
STALLED := --locked --features otel --lib --bins --test 'c[!pu]*' --test grammar --test '[!cgq]*'
stalls: model clients templates
	$(CARGO) test $(STALLED) --no-run
	$(CC) -std=gnu11 -Wall -Werror -O2 -shared -fPIC -o target/stalls.so tests/stalls/stalls.c
	QUELL_SOAK_REQUESTS=2000 LD_PRELOAD=$(CURDIR)/target/stalls.so \
	    $(CARGO) test $(STALLED) --no-fail-fast

## Formatting, lints and documentation.
lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets --features quell/otel -- -D warnings
	@# Without the tests, whose dependencies switch features on that the product needs itself.
	$(CARGO) clippy --locked -- -D warnings
	$(CARGO) clippy --locked --no-default-features -- -D warnings
	$(CARGO) clippy --locked -p interleavings --features loom --test loom -- -D warnings
	$(CARGO) clippy --locked -p interleavings --features shuttle --test shuttle -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps

## Measures this machine: kernels, the host side, then the whole engine; and counts the
## instructions of a step. More of a GPU: scripts/gpu/bench. Beside llama.cpp:
## scripts/compare-llama-cpp.
bench: model
	$(CARGO) bench --locked --bench cpu_linear
	$(CARGO) bench --locked --bench cpu_step
	$(CARGO) bench --locked --bench sampling
	$(CARGO) bench --locked --bench schedule
	$(CARGO) bench --locked --bench stream
	$(CARGO) bench --locked --bench cancel
	$(CARGO) bench --locked --bench prefix -- $(MODEL)
	$(CARGO) bench --locked --bench grammar
	$(CARGO) bench --locked --bench server
	$(CARGO) bench --locked --bench kernels
	$(CARGO) build --release --locked
	./target/release/quell bench --model $(MODEL) --mixed
	$(PYTHON) scripts/count-instructions

## CUDA kernels to the portable images of kernels/ptx; run it after a change of kernels/.
kernels:
	$(PYTHON) scripts/compile-kernels

## Fails if the images are not what the kernels compile to, or if a kernel wastes the GPU.
kernels-check:
	$(PYTHON) scripts/compile-kernels --check
	$(PYTHON) scripts/check-resources

model:
	@$(PYTHON) scripts/fetch-model

## Installs the Python clients, the router and the browser that the server is tested with.
clients:
	@$(PYTHON) scripts/setup-clients
	@$(PYTHON) scripts/setup-browser

## Fetches the chat templates of other models that ours are compared with jinja2 on.
templates:
	@$(PYTHON) scripts/fetch-templates
