// Conversations that this browser keeps, pictures included, in IndexedDB.

function store(mode, action) {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("mlx_llava", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("conversations", { keyPath: "id" });
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () => {
      const database = opening.result;
      const transaction = database.transaction("conversations", mode);
      const request = action(transaction.objectStore("conversations"));
      transaction.oncomplete = () => { database.close(); resolve(request.result); };
      transaction.onabort = transaction.onerror = () => { database.close(); reject(transaction.error); };
    };
  });
}

export const save = (conversation) => store("readwrite", (all) => all.put(conversation));
export const forget = (id) => store("readwrite", (all) => all.delete(id));
export const forgetAll = () => store("readwrite", (all) => all.clear());

// All of them, the newest first.
export async function list() {
  const stored = await store("readonly", (all) => all.getAll());
  return stored.sort((a, b) => b.at - a.at);
}
