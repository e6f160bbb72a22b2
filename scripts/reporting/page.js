// Ticked images make the text for exclude.txt. Without this script the text holds all flagged images.
const lines = document.getElementById("exclusions");
const boxes = [...document.querySelectorAll("input.pick")];
document.documentElement.classList.add("scripted");
function write() {
  const picked = boxes.filter((box) => box.checked).map((box) => box.value);
  lines.value = picked.join("\n") + (picked.length ? "\n" : "");
  lines.rows = Math.min(12, Math.max(4, picked.length + 2));
  document.getElementById("picked").textContent = String(picked.length);
}
for (const box of boxes) box.addEventListener("change", write);
if (lines) {
  document.getElementById("copy").addEventListener("click", () => {
    lines.select();
    document.execCommand("copy");
  });
  write();
}
