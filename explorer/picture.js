// The picture of the page, in the component's `element`. A click or the arrow keys choose a pixel; a drag, or Shift
// with the arrow keys, chooses a rectangle. props.value: {src, L, words, outline, region, pixel}.
const box = document.createElement("div");
box.className = "picture";
box.tabIndex = 0;
box.innerHTML = `<img alt=""><svg preserveAspectRatio="none">
  <path class="cone halo"></path><path class="cone"></path>
  <rect class="region halo"></rect><rect class="region"></rect>
  <rect class="pixel halo" width="1" height="1"></rect><rect class="pixel" width="1" height="1"></rect></svg>`;
element.append(box);
const [image, svg] = [box.querySelector("img"), box.querySelector("svg")];
let [start, end, dragged, number] = [null, null, false, 0]; // corners of a rectangle, [row, column]; of the last event

const place = (name, region) => svg.querySelectorAll(name).forEach((each) => {
  each.style.display = region ? "" : "none";
  ["y", "x", "height", "width"].forEach((side, k) => region && each.setAttribute(side, region[k]));
});

function draw() {
  const value = props.value;
  if (!value) return;
  image.src = value.src;
  image.alt = value.words;
  box.setAttribute("role", "application");
  box.setAttribute("aria-label", `${value.words}. Arrow keys choose a pixel, with Shift a rectangle.`);
  svg.setAttribute("viewBox", `0 0 ${value.L} ${value.L}`);
  svg.querySelectorAll(".cone").forEach((each) => each.setAttribute("d", value.outline));
  if (dragged) return;
  place(".region", value.region);
  place(".pixel", value.pixel && [...value.pixel, 1, 1]);
}

const within = (k) => Math.max(0, Math.min(props.value.L - 1, k));

function at(event) {
  const frame = box.getBoundingClientRect();
  const [y, x] = [(event.clientY - frame.top) / frame.height, (event.clientX - frame.left) / frame.width];
  return [y, x].map((share) => within(Math.floor(share * props.value.L)));
}

function region() {
  const corner = start.map((k, axis) => Math.min(k, end[axis]));
  return [...corner, ...start.map((k, axis) => Math.abs(k - end[axis]) + 1)];
}

function choose() {
  const [row, column, height, width] = region();
  number += 1;
  if (dragged) trigger("region", { number, row, column, height, width });
  else trigger("pixel", { number, row, column });
}

function move(to) {
  dragged ||= to.some((k, axis) => k !== start[axis]);
  end = to;
  if (dragged) place(".region", region());
}

box.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  box.setPointerCapture(event.pointerId);
  [start, end, dragged] = [at(event), at(event), false];
});
box.addEventListener("pointermove", (event) => {
  if (box.hasPointerCapture(event.pointerId)) move(at(event));
});
box.addEventListener("pointerup", () => {
  choose();
  dragged = false;
});
box.addEventListener("pointercancel", () => {
  dragged = false;
  draw();
});
box.addEventListener("keydown", (event) => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const from = end || props.value.pixel || [0, 0];
  const to = from.map((k, axis) => within(k + step[axis]));
  if (event.shiftKey) {
    start ||= from;
    move(to);
  } else {
    [start, end, dragged] = [to, to, false];
    place(".pixel", [...to, 1, 1]);
  }
  choose();
  dragged = event.shiftKey;
});
box.addEventListener("keyup", (event) => {
  if (event.key === "Shift") dragged = false;
});
draw();
watch("value", draw);
