import pytest
from llama_patches.errors import BuildError
from llama_patches.settings import Settings


def defines(config=None, environment=None, machine="x86_64"):
    return Settings.read(config, environment or {}).defines(machine)


def test_the_defaults():
    assert defines() == ["-DGGML_RPC=ON", "-DGGML_NATIVE=ON"]


def test_portable_is_a_stated_baseline():
    features = ["SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2"]
    expected = ["-DGGML_RPC=ON", "-DGGML_NATIVE=OFF", *(f"-DGGML_{feature}=ON" for feature in features)]
    assert defines({"cpu": "portable"}) == defines({"cpu": "portable"}, machine="AMD64") == expected
    arm = ["-DGGML_RPC=ON", "-DGGML_NATIVE=OFF", "-DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod"]
    assert defines({"cpu": "portable"}, machine="arm64") == arm
    with pytest.raises(BuildError, match="no baseline is stated for riscv64"):
        defines({"cpu": "portable"}, machine="riscv64")


@pytest.mark.parametrize(
    ("value", "architectures"),
    [
        ("on", "86"),
        ("89", "89"),
        ("8.6,90", "86;90"),
        ("86;89 90", "86;89;90"),
        ("90a", "90a"),
        ("120-real", "120-real"),
    ],
)
def test_cuda(value, architectures):
    assert defines({"cuda": value})[2:] == ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]


@pytest.mark.parametrize("value", ["off", "OFF", "0", "no"])
def test_no_cuda(value):
    assert defines({"cuda": value}) == defines()


def test_the_environment_says_the_same_and_pip_wins():
    environment = {"ZIGGURAT_CPU": "portable", "ZIGGURAT_CUDA": "89", "ZIGGURAT_SOURCE": "here"}
    settings = Settings.read({"cuda": ["90", "off"]}, environment)
    assert (settings.cpu, settings.cuda, settings.source) == ("portable", (), "here")


def test_the_users_cmake_args_come_last():
    settings = Settings.read({"cuda": "86,89"}, {"CMAKE_ARGS": "-DGGML_NATIVE=OFF -DX='a b'"})
    assert settings.all_cmake_args() == (
        "-DGGML_RPC=ON -DGGML_NATIVE=ON -DGGML_CUDA=ON '-DCMAKE_CUDA_ARCHITECTURES=86;89' -DGGML_NATIVE=OFF -DX='a b'"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cdua": "on"}, "unknown setting 'cdua'"),
        ({"cpu": "fast"}, "cpu=fast: choose one of native, portable"),
        ({"cuda": "A40"}, "cuda=A40: give off, on"),
    ],
)
def test_mistakes_are_one_line(config, message):
    with pytest.raises(BuildError, match=message) as caught:
        Settings.read(config, {})
    assert "\n" not in str(caught.value)


def test_settings_of_other_backends():
    settings = Settings.read({"cmake.verbose": "true", "--build-option": "x"}, {})
    assert settings.passed_on == {"cmake.verbose": "true"}
