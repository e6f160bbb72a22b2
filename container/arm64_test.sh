#!/usr/bin/env bash
# arm64_test.sh [FOLDER]: install the requirements, and run tests and the demo in an emulated ARM64 Debian below FOLDER
# (default: /var/tmp). This tests what a DGX Spark's processor runs, without its GPU. Takes about an hour and 12 GB.
# Needs root and the Debian packages debootstrap and qemu-user-static. Removes everything it has created, even after a failure.
set -euo pipefail
# Tests of what depends on libraries in machine code, beside the training in the demo: faces, image formats, colors, taggers, the page.
TESTS=(tests/common/test_{faces,images,color}.py tests/captioning/test_{wd14,opencv_faces}.py tests/reporting)
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

need() { command -v "$1" >/dev/null || { echo "arm64_test.sh: $1 is missing: run apt-get install $2" >&2 && exit 2; }; }
need debootstrap debootstrap
need qemu-aarch64-static qemu-user-static
((EUID == 0)) || { echo "arm64_test.sh: must be run as root: sudo make arm64-test" >&2 && exit 2; }

workdir=$(mktemp -d "${1:-/var/tmp}/loracat-arm64.XXXXXX")
root=$workdir/root formats=/proc/sys/fs/binfmt_misc registered="" mounted=()
clean_up() {
    for ((n = ${#mounted[@]} - 1; n >= 0; n--)); do umount "${mounted[n]}"; done
    [[ ! $registered ]] || echo -1 >"$formats/qemu-aarch64"
    rm -rf --one-file-system "$workdir"
}
trap clean_up EXIT

# Let the kernel run ARM64 programs through qemu. With the flag F it opens qemu now, outside the emulated root.
[[ -e $formats/register ]] || mount -t binfmt_misc binfmt_misc "$formats"
if [[ ! -e $formats/qemu-aarch64 ]]; then
    cat /usr/lib/binfmt.d/qemu-aarch64.conf >"$formats/register"
    registered=yes
fi

echo "Creating an ARM64 Debian in $root."
debootstrap --arch arm64 --variant=minbase --include=ca-certificates,make,python3,python3-pip,python3-venv bookworm "$root" >"$workdir/log" ||
    { tail -n 20 "$workdir/log" >&2 && exit 1; }
rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
cp -L /etc/resolv.conf "$root/etc/resolv.conf"
echo "127.0.0.1 localhost" >"$root/etc/hosts"
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
bind() {
    mount --bind "$1" "$2"
    mounted+=("$2")
    mount --make-private "$2"
}
bind /proc "$root/proc"
bind /sys "$root/sys"
# torch reads the processor from these files and stops if an ARM64 program finds an x86-64 one: describe a Cortex-A76 instead.
for cpu in 0 1; do
    printf '%s\t: %s\n' processor $cpu BogoMIPS 100.00 Features 'fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid' \
        'CPU implementer' 0x41 'CPU architecture' 8 'CPU variant' 0x0 'CPU part' 0xd0b 'CPU revision' 1
    echo
done >"$workdir/cpuinfo"
bind "$workdir/cpuinfo" "$root/proc/cpuinfo"
in_root() {
    chroot "$root" env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 OMP_NUM_THREADS=1 \
        PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CERT=/etc/ssl/certs/ca-certificates.crt "$@"
}

# Downloaded and unpacked outside the emulation, which takes a tenth of the time; pip then checks it in the emulation.
version=$(in_root python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
packages=$root/usr/local/lib/python$version/dist-packages
echo "Installing the requirements, and torch in place of the base image's."
python3 -m venv "$workdir/venv"
platforms=(--platform manylinux2014_aarch64)
for glibc in {17..36}; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
grep -vE '^(-r|ruff|shellcheck)' requirements-dev.txt >"$workdir/requirements-test.txt"
"$workdir/venv/bin/python" -m pip install --quiet --no-compile --only-binary :all: --python-version "$version" --implementation cp \
    "${platforms[@]}" --target "$packages" --requirement requirements.txt --requirement "$workdir/requirements-test.txt"
mkdir "$root/opt/loracat"
git ls-files -z | xargs -0 cp --parents --target-directory="$root/opt/loracat"
in_root python3 -m pip install --no-cache-dir --quiet --requirement /opt/loracat/requirements.txt
in_root python3 -m pip check
in_root python3 -c '
import platform, accelerate, cv2, diffusers, dlib, huggingface_hub, jinja2, onnxruntime, peft, PIL, pillow_heif, requests, safetensors
import tensorboard, tokenizers, torch, transformers, wandb
print("imported on", platform.machine(), "with torch", torch.__version__)'

echo "Running tests in the emulation."  # those of downloads have time limits that are too short for it
in_root bash -c 'cd /opt/loracat && python3 -m pytest -n 0 --timeout 1800 -k "not download" "$@"' pytest "${TESTS[@]}"

echo "Running the demo in the emulation."  # without SVE, in whose emulation a convolution of torch takes minutes
in_root QEMU_CPU=cortex-a76 bash -c 'cd /opt/loracat && PYTHON=python3 python3 -m demo --workspace /var/tmp/demo'
echo "ARM64 test passed: the requirements install and import, the tests pass, and the demo trains its LoRA."
