// Small pieces of DOM. Text of runs goes in by textContent alone.

export const at = (id) => document.getElementById(id);

export function make(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export function draw(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// The colour of a state is a variable of the style sheet.
export const paint = (element, name) => Object.assign(element.style, { background: `var(--${name})`, fill: `var(--${name})` }) && element;

const known = new WeakMap();

// Fill an element anew, only when what it shows (`key`, any JSON) has changed: focus and scroll stay.
export function fill(element, key, build) {
  const text = document.documentElement.lang + JSON.stringify(key);
  if (known.get(element) === text) return;
  known.set(element, text);
  element.replaceChildren(...build());
}
