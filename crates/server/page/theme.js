// Before anything is drawn: light or dark, as it was chosen here last. Without a choice the style follows the system.
"use strict";
try {
  const { theme } = JSON.parse(localStorage.getItem("apr.settings")) ?? {};
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch { /* A browser that keeps nothing follows the system. */ }
