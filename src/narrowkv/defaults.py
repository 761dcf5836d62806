"""Names and elements that the command line shows in its help, stored where nothing heavy is imported."""

AUTO = "auto"  # the attention backend that suits device and recipe
DENSE = "dense"  # attention by the model itself, over elements that went through the codec
DEMO = "narrowkv://demo"  # the model that comes with the package
RECIPE = "narrow3"
MIX = "narrowkv://mix"  # the text to learn from where none is given

REFERENCE_TOKENS = 32_768  # at which bits are counted: tables weigh less the longer a cache is
STREAM_CHUNK = 128  # tokens of a chunk where a text is scored as a stream
WINDOW, SAMPLES = 2048, 16  # tokens of a sequence and sequences to learn from
MIX_WINDOW, MIX_SAMPLES = 512, 32  # of the mix, which has about 24,000 tokens: some are left for `--check`

ABLATIONS = ("steps", "grid", "outliers", "sinks", "parts", "texts", "times")
TASKS = ("passkey", "key-value", "multi-needle", "variables", "counting")
SHAPES = ("llama-7b", "llama-13b", "llama-30b", "llama-65b", "llama-2-70b", "llama-3-8b", "llama-3-70b")

TASK_LENGTHS = (512, 1024, 2048)
TASK_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TASK_ROWS = 16
NEW_TOKENS = 64
INSPECTED = "nuq3-1%"  # the recipe whose codebook is drawn
EXPORT_FORMATS = ("compressed-tensors", "onnxruntime-genai", "vllm-scales")
